//! Tensor parallelism by the core's assignment gives the bits of one machine: every rank computes the outputs that it
//! owns from its rows alone, and gathering them is concatenation.

use lite_llm_core::topology::{BaseTensor, Division, Place, Topology, assign};
use lite_llm_model::kernels::{DType, Isa, PackedView, Pool, linear, pack, packed_len};
use proptest::prelude::*;

fn product(x: &[f32], weights: &[u8], rows: usize, inputs: usize) -> Vec<u32> {
    let mut packed = vec![0; packed_len(DType::F32, rows, inputs).unwrap()];
    pack(DType::F32, rows, inputs, weights, &mut packed);
    let view = PackedView::new(DType::F32, rows, inputs, &packed).unwrap();
    let mut out = vec![0.0; rows];
    linear(&Pool::new(1), Isa::detect(), x, 1, &view, None, &mut out);
    out.into_iter().map(f32::to_bits).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn gathered_outputs_are_those_of_one_machine(
        ranks in 1u32..7,
        groups in 1u32..9,
        together in 1u32..9,
        inputs in 1usize..1200,
        seed: u32,
    ) {
        let rows = groups * together;
        let value = |n: usize| {
            let mixed = (n as u32 ^ seed).wrapping_mul(0x9e37_79b1);
            (mixed >> 8) as f32 / 8_388_608.0 - 1.0
        };
        let x: Vec<f32> = (0..inputs).map(value).collect();
        let weights: Vec<u8> =
            (0..rows as usize * inputs).flat_map(|n| value(n + inputs).to_le_bytes()).collect();
        let tensor = BaseTensor { place: Place::Layer(0), rows, division: Division::Rows { together } };
        let topology = Topology { data: 1, tensor: ranks, pipeline: 1, expert: 1 };
        let gathered: Vec<u32> = assign(&topology, 1, &[tensor])
            .unwrap()
            .into_iter()
            .flat_map(|slice| {
                let bytes = slice.rows.start as usize * inputs * 4..slice.rows.end as usize * inputs * 4;
                product(&x, &weights[bytes], slice.rows.len(), inputs)
            })
            .collect();
        prop_assert_eq!(gathered, product(&x, &weights, rows as usize, inputs));
    }
}
