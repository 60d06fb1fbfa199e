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
