// Every kernel, compiled as it stands for the CPU, and a table to launch it by name. The only file that is instrumented for the shim;
// the stand-in for the driver (../stand_in) has it as it is.
#include <tuple>
#include <type_traits>
#include <utility>

#include "../arrange.cu"
#include "../attention.cu"
#include "../embed.cu"
#include "../exponential.cu"
#include "../grouped.cu"
#include "../linear.cu"
#include "../moe.cu"
#include "../norm.cu"
#include "../rope.cu"
#include "../sample.cu"
#include "planted.cuh"

namespace shim {
namespace {

template <class T>
T value_of(const Argument& argument) {
    if constexpr (std::is_pointer_v<T>) {
        return argument.is_buffer ? reinterpret_cast<T>(argument.bits) : nullptr;
    } else if constexpr (std::is_same_v<T, float>) {
        return __uint_as_float(static_cast<unsigned>(argument.bits));
    } else {
        return static_cast<T>(argument.bits);
    }
}

template <class... A, std::size_t... I>
void call_with(void (*kernel)(A...), const Argument* arguments, std::index_sequence<I...>) {
    kernel(value_of<A>(arguments[I])...);
}

template <class... A>
constexpr std::size_t count(void (*)(A...)) {
    return sizeof...(A);
}

template <class... A>
const Parameter* parameters(void (*)(A...)) {
    static const Parameter list[] = {{sizeof(A), std::is_pointer_v<A>, std::is_const_v<std::remove_pointer_t<A>>}...};
    return list;
}

template <class... A>
void call(void (*kernel)(A...), const Argument* arguments) {
    call_with(kernel, arguments, std::index_sequence_for<A...>());
}

}  // namespace

#define ENTRY(name) {#name, count(name), parameters(name), [](const Argument* arguments) { call(name, arguments); }}

const Kernel kernels[] = {
    ENTRY(arrange),
    ENTRY(embed_f32),
    ENTRY(embed_bf16),
    ENTRY(embed_f16),
    ENTRY(exponentials),
    ENTRY(exponential_hashes),
    ENTRY(rms_norm),
    ENTRY(layer_norm),
    ENTRY(rope),
    ENTRY(repack),
    ENTRY(linear_one_row_f32),
    ENTRY(linear_one_row_bf16),
    ENTRY(linear_one_row_f16),
    ENTRY(linear_few_rows_f32),
    ENTRY(linear_few_rows_bf16),
    ENTRY(linear_few_rows_f16),
    ENTRY(linear_some_rows_f32),
    ENTRY(linear_many_rows_f32),
    ENTRY(linear_some_rows_bf16),
    ENTRY(linear_many_rows_bf16),
    ENTRY(linear_some_rows_f16),
    ENTRY(linear_many_rows_f16),
    ENTRY(write_cache_f32),
    ENTRY(attention_scores_f32),
    ENTRY(attention_mix_f32),
    ENTRY(write_cache_bf16),
    ENTRY(attention_scores_bf16),
    ENTRY(attention_mix_bf16),
    ENTRY(write_cache_f16),
    ENTRY(attention_scores_f16),
    ENTRY(attention_mix_f16),
    ENTRY(attention_sum),
    ENTRY(route),
    ENTRY(route_tiers),
    ENTRY(route_sparsely),
    ENTRY(find_users),
    ENTRY(clip),
    ENTRY(swiglu),
    ENTRY(clamped_swiglu),
    ENTRY(add),
    ENTRY(combine),
    ENTRY(divide),
    ENTRY(penalise),
    ENTRY(argmax),
    ENTRY(sample),
    ENTRY(linear_one_row_mxfp4),
    ENTRY(linear_few_rows_mxfp4),
    ENTRY(linear_some_rows_mxfp4),
    ENTRY(linear_many_rows_mxfp4),
    ENTRY(linear_one_row_e4m3),
    ENTRY(linear_few_rows_e4m3),
    ENTRY(linear_some_rows_e4m3),
    ENTRY(linear_many_rows_e4m3),
    ENTRY(quantise),
    ENTRY(embed_q8),
    ENTRY(linear_one_row_q8),
    ENTRY(linear_few_rows_q8),
    ENTRY(linear_some_rows_q8),
    ENTRY(linear_many_rows_q8),
    ENTRY(embed_q4),
    ENTRY(linear_one_row_q4),
    ENTRY(linear_few_rows_q4),
    ENTRY(linear_some_rows_q4),
    ENTRY(linear_many_rows_q4),
    ENTRY(planted_race),
    ENTRY(planted_race_of_warp),
    ENTRY(planted_race_of_blocks),
    ENTRY(planted_late_write),
    ENTRY(planted_divergence),
    ENTRY(planted_overrun),
    ENTRY(planted_unwritten),
    ENTRY(planted_early_read),
    ENTRY(planted_copies_of_others),
    ENTRY(planted_early_copy),
    ENTRY(planted_lost_copy),
    ENTRY(planted_misaligned_copy),
    ENTRY(planted_no_bad_copy),
    ENTRY(planted_none),
};
const std::size_t kernels_count = sizeof(kernels) / sizeof(kernels[0]);

}  // namespace shim
