// Kernels that are wrong on purpose, each in one way, and one that is right: what the shim has to find, and what it has to let be.
#pragma once
#include "../words.cuh"

// Reverses a block through shared memory, without the barrier between writing and reading.
KERNEL planted_race(u32* values) {
    SHARED(u32, room, 64);
    room[threadIdx.x] = values[threadIdx.x];
    values[threadIdx.x] = room[63 - threadIdx.x];
}

// The same within a warp, which trusts that a shuffle orders memory.
KERNEL planted_race_of_warp(u32* values) {
    SHARED(u32, room, 32);
    room[threadIdx.x] = values[threadIdx.x];
    const u32 first = __shfl_sync(ALL, values[threadIdx.x], 0);
    values[threadIdx.x] = first + room[31 - threadIdx.x];
}

// Two blocks write one place.
KERNEL planted_race_of_blocks(u32* values) { values[threadIdx.x] = blockIdx.x; }

// Shared memory is used again while others may still read it.
KERNEL planted_late_write(u32* values) {
    SHARED(u32, room, 64);
    for (u32 turn = 0; turn < 2; turn++) {
        room[threadIdx.x] = values[threadIdx.x] + turn;
        __syncthreads();
        values[threadIdx.x] = room[63 - threadIdx.x];
    }
}

// Not every thread comes to the barrier.
KERNEL planted_divergence(u32* values) {
    if (threadIdx.x < 32) {
        __syncthreads();
    }
    values[threadIdx.x] = threadIdx.x;
}

// The last thread writes behind the end.
KERNEL planted_overrun(u32* values) { values[threadIdx.x + 1] = threadIdx.x; }

// Half of what is read was never written.
KERNEL planted_unwritten(u32* values) {
    SHARED(u32, room, 64);
    if (threadIdx.x < 32) room[threadIdx.x] = threadIdx.x;
    __syncthreads();
    values[threadIdx.x] = room[63 - threadIdx.x];
}

// What was copied is read before it was waited for.
KERNEL planted_early_read(u32* values) {
    SHARED(u32, room, 64);
    copy_async<4>(room + threadIdx.x, values + threadIdx.x);
    const u32 early = room[threadIdx.x];
    wait_for_copies();
    values[threadIdx.x] = early;
}

// A thread waits for its own copies alone.
KERNEL planted_copies_of_others(u32* values) {
    SHARED(u32, room, 64);
    copy_async<4>(room + threadIdx.x, values + threadIdx.x);
    __syncthreads();
    wait_for_copies();
    const u32 other = room[63 - threadIdx.x];
    __syncthreads();
    values[threadIdx.x] = other;
}

// A copy begins while others may still read what was there, though it ends after a barrier.
KERNEL planted_early_copy(u32* values) {
    SHARED(u32, room, 64);
    room[threadIdx.x] = values[threadIdx.x];
    __syncthreads();
    const u32 other = room[63 - threadIdx.x];
    copy_async<4>(room + threadIdx.x, values + threadIdx.x);
    __syncthreads();
    wait_for_copies();
    values[threadIdx.x] = other;
}

// Nobody waits for a copy.
KERNEL planted_lost_copy(u32* values) {
    SHARED(u32, room, 64);
    copy_async<4>(room + threadIdx.x, values + threadIdx.x);
}

// A copy of more bytes than where it begins allows.
KERNEL planted_misaligned_copy(u32* values) {
    SHARED(u32, room, 64);
    if (threadIdx.x == 0) copy_async<16>(room, values + 1);
    wait_for_copies();
}

// Reverses a block through copies.
KERNEL planted_no_bad_copy(u32* values) {
    SHARED(u32, room, 64);
    copy_async<4>(room + threadIdx.x, values + threadIdx.x);
    wait_for_copies();
    __syncthreads();
    values[threadIdx.x] = room[63 - threadIdx.x];
}

// Reverses in each warp, then in the block, with the barriers that this takes.
KERNEL planted_none(u32* values) {
    SHARED(u32, room, 64);
    room[threadIdx.x] = values[threadIdx.x];
    __syncwarp();
    const u32 value = room[threadIdx.x / 32 * 32 + 31 - threadIdx.x % 32];
    __syncwarp();
    room[threadIdx.x] = value;
    __syncthreads();
    values[threadIdx.x] = room[63 - threadIdx.x];
}
