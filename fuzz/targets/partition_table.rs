#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| qblk_fuzz::partition::partition_table(data));

/// Without libFuzzer: run through files, as a crash's input.
#[cfg(not(fuzzing))]
fn main() -> std::io::Result<()> {
    qblk_fuzz::run_files(qblk_fuzz::partition::partition_table)
}
