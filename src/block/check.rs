//! Checking images: what is asked for, and what was found.

/// What a check mends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Repair {
    /// Nothing is written.
    #[default]
    Nothing,
    /// Clusters that nothing uses are given back.
    Leaks,
    /// All that can be mended without losing data.
    All,
}

/// What a check found. Numbers of `corruptions` and `leaks` are those that are left: with a repair,
/// those that it did not mend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Places that contradict the format, or that will lose data when they are written to.
    pub corruptions: u64,
    /// Space that is counted as in use more often than it is.
    pub leaks: u64,
    /// Corruptions that were mended.
    pub corruptions_fixed: u64,
    /// Leaks that were mended.
    pub leaks_fixed: u64,
    /// Places that could not be looked at: what they hide is not in the other numbers.
    pub check_errors: u64,
    /// Where the last part of the file that is in use ends, bytes.
    pub image_end: u64,
    /// Clusters that the guest's disk has.
    pub total_clusters: u64,
    /// Those of them that are in this image.
    pub allocated_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
    /// Those that do not lie behind their neighbour.
    pub fragmented_clusters: u64,
    /// The image was changed.
    pub changed: bool,
}
