//! Counts in a slice of a refcount block, 1 to 64 bits wide.

/// Count `index` of a slice; counts below a byte fill a byte from its low end.
pub(in super::super) fn read_count(data: &[u8], index: u64, order: u32) -> u64 {
    let i = index as usize;
    match order {
        0..3 => {
            let (bits, per) = (1 << order, 8 >> order);
            let byte = data.get(i / per).copied().unwrap_or(0);
            u64::from(byte >> (i % per * bits)) & ((1 << bits) - 1)
        }
        _ => {
            let n = 1 << (order - 3);
            let bytes = data.get(i * n..(i + 1) * n).unwrap_or_default();
            bytes.iter().fold(0, |v, b| v << 8 | u64::from(*b))
        }
    }
}

/// The largest count that is 2^order bits wide.
pub(in super::super) fn max_count(order: u32) -> u64 {
    match order {
        6.. => u64::MAX,
        _ => (1 << (1u32 << order)) - 1,
    }
}

pub(in super::super) fn write_count(data: &mut [u8], index: u64, order: u32, count: u64) {
    let i = index as usize;
    match order {
        0..3 => {
            let (bits, per) = (1 << order, 8 >> order);
            let shift = i % per * bits;
            if let Some(byte) = data.get_mut(i / per) {
                *byte = *byte & !(((1u32 << bits) - 1) << shift) as u8 | (count << shift) as u8;
            }
        }
        _ => {
            let n = 1 << (order - 3);
            if let Some(bytes) = data.get_mut(i * n..(i + 1) * n) {
                bytes.copy_from_slice(&count.to_be_bytes()[8 - n..]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_read_back_and_leave_neighbours_alone() {
        for order in 0..=6 {
            let mut data = vec![0; 64];
            let max = max_count(order);
            assert_eq!(max.count_ones(), 1 << order);
            let n = (64 * 8) >> order;
            write_count(&mut data, 3, order, max);
            write_count(&mut data, 5, order, 1);
            for i in 0..n {
                let want = match i {
                    3 => max,
                    5 => 1,
                    _ => 0,
                };
                assert_eq!(read_count(&data, i, order), want, "order {order} index {i}");
            }
            write_count(&mut data, 3, order, 0);
            assert_eq!(read_count(&data, 3, order), 0);
        }
        // Low end first, as the specification has it.
        let mut data = [0u8; 1];
        write_count(&mut data, 0, 2, 0xa);
        assert_eq!(data, [0x0a]);
    }
}
