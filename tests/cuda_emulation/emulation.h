// Runs CUDA kernels on the CPU: what is built into CUDA C++, for a host compiler. Force-included before a .cu file.
//
// Every CUDA thread is a fiber. Blocks run one after another; the threads of a block run one at a time, each until it
// meets others: at a barrier, or in an instruction of the whole warp. In which order they run is up to the caller
// (forwards, backwards, or a seeded shuffle anew at every round), as a missing barrier shows in some orders only.
//
// Made to be worse than the hardware: shared memory starts as NaN, and asynchronous copies land at the last moment their
// thread allows (forwards), at once (backwards: over what others still read, if they come too early) or now so, now so
// (shuffled). Copies and checked loads outside the caller's buffers or not aligned are errors, as are a barrier or a
// warp's instruction that not all of its threads reach, or that they reach at different lines.
//
// Not covered: blocks at the same time, the memory model, time.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)

using std::floor;
using std::fma;
using std::max;
using std::min;
using std::rint;

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulation {

struct Index {
    int x = 0, y = 0, z = 0;
};

// -- fibers --------------------------------------------------------------------------------------------------------

constexpr size_t STACK_BYTES = 128 * 1024;

#if defined(__x86_64__)
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.local emulation_switch
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, .-emulation_switch
)");

struct Fiber {
    void* stack_pointer = nullptr;
};

static void start(Fiber& fiber, char* stack, void (*entry)()) {
    auto top = reinterpret_cast<uintptr_t>(stack + STACK_BYTES) & ~uintptr_t(15);
    auto* words = reinterpret_cast<void**>(top);
    *--words = nullptr;  // where `entry` would return to; also what aligns its frame
    *--words = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--words = nullptr;
    fiber.stack_pointer = words;
}
static void change(Fiber& from, Fiber& to) { emulation_switch(&from.stack_pointer, to.stack_pointer); }
#else
struct Fiber {
    ucontext_t context;
};
static void start(Fiber& fiber, char* stack, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}
static void change(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#endif

// -- one block -----------------------------------------------------------------------------------------------------

struct Copy {
    void* target;
    const void* source;
    int bytes;
    bool valid;
};

constexpr int NOWHERE = -1;

struct Thread {
    Fiber fiber;
    std::vector<char> stack;
    int index = 0;
    bool done = false;
    int waits_at = NOWHERE;  // line of the barrier or kind of the warp's instruction
    bool in_warp = false;    // waits for its warp, not for the block
    std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
    std::vector<Copy> open;
    unsigned operands[8];  // of a warp's instruction
    unsigned results[4];
};

struct Region {
    uintptr_t begin, end;
};

static std::vector<Thread> threads;
static int thread_count;
static Thread* current;
static Fiber scheduler;
static std::vector<Region> regions;
static std::vector<unsigned char> shared_room;
static unsigned char* shared_memory;
static int shared_bytes;
static std::string error;
static int thread_order;
static std::mt19937 landing;
static Index thread_index, block_index, block_dimension, grid_dimension;
static void (*body)(void*);
static void* body_arguments;

[[noreturn]] static void leave_for_ever() {
    change(current->fiber, scheduler);
    std::abort();  // a thread that has ended is never resumed
}

// Ends the launch with this message; the thread is left where it is.
[[noreturn]] static void fail(const std::string& message) {
    if (error.empty()) error = message + " (thread " + std::to_string(current->index) + ")";
    current->done = true;
    leave_for_ever();
}

static void meet(int where, bool in_warp) {
    current->waits_at = where;
    current->in_warp = in_warp;
    change(current->fiber, scheduler);
}

static void check_global(const void* pointer, size_t bytes, const char* what) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    if (address % bytes) fail(std::string(what) + ": address is not a multiple of " + std::to_string(bytes));
    for (const Region& region : regions)
        if (address >= region.begin && address + bytes <= region.end) return;
    fail(std::string(what) + " outside every buffer");
}

static void check_shared(const void* pointer, size_t bytes, const char* what) {
    const auto* address = static_cast<const unsigned char*>(pointer);
    if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail(std::string(what) + ": shared address is not aligned");
    if (address < shared_memory || address + bytes > shared_memory + shared_bytes)
        fail(std::string(what) + " outside shared memory");
}

static void land(const std::vector<Copy>& group) {
    for (const Copy& copy : group) {
        if (copy.valid)
            std::memcpy(copy.target, copy.source, copy.bytes);
        else
            std::memset(copy.target, 0, copy.bytes);
    }
}

// A copy that starts now.
static void begin_copy(const Copy& copy) {
    if (thread_order == 1 || (thread_order > 1 && landing() % 2))
        land({copy});
    else
        current->open.push_back(copy);
}

static void run_thread() {
    body(body_arguments);
    // What was never waited for may land at any time, also after the block has ended: hardware finishes it.
    current->done = true;
    leave_for_ever();
}

static void (*finish_warp)(int kind, Thread* warp);  // computes the results of a warp's instruction

// Lets those go on whom everybody they wait for has joined: one warp, the first of `turn` that can, so that a warp runs
// ahead of the others as far as the barriers let it; else the block. False: nobody can go on.
static bool release(const std::vector<int>& turn) {
    for (int chosen : turn) {
        const int first = chosen / 32 * 32, size = std::min(32, thread_count - first);
        if (threads[chosen].done || !threads[chosen].in_warp) continue;
        Thread* warp = &threads[first];
        bool complete = true;
        for (int i = 0; i < size; i++)
            complete = complete && !warp[i].done && warp[i].in_warp && warp[i].waits_at != NOWHERE;
        if (!complete) continue;
        for (int i = 1; i < size; i++) {
            if (warp[i].waits_at != warp[0].waits_at) {
                error = "the threads of a warp are at different instructions of the whole warp";
                return false;
            }
        }
        finish_warp(warp[0].waits_at, warp);
        for (int i = 0; i < size; i++) warp[i].waits_at = NOWHERE;
        return true;
    }
    int line = NOWHERE;
    bool complete = true;
    for (int i = 0; i < thread_count; i++) {
        const Thread& thread = threads[i];
        if (thread.done) {
            complete = false;  // CUDA would let the others pass; no kernel here ends some threads before a barrier
            continue;
        }
        if (thread.in_warp || thread.waits_at == NOWHERE || (line != NOWHERE && thread.waits_at != line))
            complete = false;
        line = thread.waits_at;
    }
    if (!complete) return false;
    for (int i = 0; i < thread_count; i++) threads[i].waits_at = NOWHERE;
    return true;
}

// order: 0 forwards, 1 backwards, above that a seed.
static void run_block(int order) {
    std::fill(shared_room.begin(), shared_room.end(), 0xFF);  // NaN in every format
    std::vector<int> turn(thread_count);
    for (int i = 0; i < thread_count; i++) {
        Thread& thread = threads[i];
        thread.index = i;
        thread.done = false;
        thread.waits_at = NOWHERE;
        thread.in_warp = false;
        thread.groups.clear();
        thread.open.clear();
        if (thread.stack.empty()) thread.stack.resize(STACK_BYTES);
        start(thread.fiber, thread.stack.data(), run_thread);
        turn[i] = order == 1 ? thread_count - 1 - i : i;
    }
    std::mt19937 random(order);
    while (error.empty()) {
        if (order > 1) std::shuffle(turn.begin(), turn.end(), random);
        bool alive = false;
        for (int i : turn) {
            Thread& thread = threads[i];
            if (thread.done || thread.waits_at != NOWHERE) continue;
            current = &thread;
            thread_index.x = i;
            change(scheduler, thread.fiber);
            if (!error.empty()) return;
        }
        for (int i = 0; i < thread_count; i++) alive = alive || !threads[i].done;
        if (!alive) return;
        if (!release(turn) && error.empty()) error = "deadlock: threads wait for others that do not come";
    }
}

constexpr int GUARD = 256;

template <class Call>
const char* launch(const int* grid, int block, int dynamic_shared, int order, const uint64_t* bounds, int count,
                   Call call) {
    error.clear();
    regions.clear();
    thread_order = order;
    landing.seed(order);
    for (int i = 0; i < count; i++) regions.push_back({uintptr_t(bounds[2 * i]), uintptr_t(bounds[2 * i + 1])});
    thread_count = block;
    if (static_cast<int>(threads.size()) < block) threads.resize(block);
    shared_room.assign(dynamic_shared + GUARD + 16, 0);
    shared_memory = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared_room.data()) + 15) & ~15ull);
    shared_bytes = dynamic_shared;
    block_dimension = {block, 1, 1};
    grid_dimension = {grid[0], grid[1], grid[2]};
    body = [](void* callable) { (*static_cast<Call*>(callable))(); };
    body_arguments = &call;
    std::vector<int> blocks(grid[0] * grid[1] * grid[2]);
    for (size_t i = 0; i < blocks.size(); i++) blocks[i] = i;
    if (order == 1) std::reverse(blocks.begin(), blocks.end());
    std::mt19937 random(order);
    if (order > 1) std::shuffle(blocks.begin(), blocks.end(), random);
    for (int block_number : blocks) {
        block_index = {block_number % grid[0], block_number / grid[0] % grid[1], block_number / grid[0] / grid[1]};
        run_block(order);
        for (int i = 0; i < GUARD && error.empty(); i++)
            if (shared_memory[shared_bytes + i] != 0xFF) error = "wrote behind the end of shared memory";
        if (!error.empty()) break;
    }
    return error.c_str();
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_dimension
#define gridDim emulation::grid_dimension
#define __syncthreads() emulation::meet(__LINE__, false)

static inline void __threadfence() {}
template <class Number>
static inline Number atomicAdd(Number* pointer, Number value) {
    emulation::check_global(pointer, sizeof(Number), "atomicAdd");
    const Number before = *pointer;
    *pointer += value;
    return before;
}
// In shared memory.
template <class Number>
static inline Number atomicMin(Number* pointer, Number value) {
    emulation::check_shared(pointer, sizeof(Number), "atomicMin");
    const Number before = *pointer;
    *pointer = std::min(before, value);
    return before;
}

// What the caller of the library calls: launches `kernel` with arguments behind pointers, as cuLaunchKernel takes them.
namespace emulation {
template <class... Arguments, size_t... I>
const char* unpack(void (*kernel)(Arguments...), void** arguments, std::index_sequence<I...>, const int* grid,
                   int block, int dynamic_shared, int order, const uint64_t* bounds, int count) {
    return launch(grid, block, dynamic_shared, order, bounds, count,
                  [&] { kernel(*static_cast<std::decay_t<Arguments>*>(arguments[I])...); });
}
template <class... Arguments>
const char* call(void (*kernel)(Arguments...), void** arguments, const int* grid, int block, int dynamic_shared,
                 int order, const uint64_t* bounds, int count) {
    return unpack(kernel, arguments, std::index_sequence_for<Arguments...>{}, grid, block, dynamic_shared, order,
                  bounds, count);
}
}  // namespace emulation

#define EMULATED(name)                                                                                        \
    extern "C" const char* emulate_##name(void** arguments, const int* grid, int block, int dynamic_shared, \
                                          int order, const uint64_t* bounds, int count) {                     \
        return emulation::call(name, arguments, grid, block, dynamic_shared, order, bounds, count);           \
    }
