// Asynchronous copies from global to shared memory (cp.async, sm_80 and newer): they pass by the registers, and the
// thread goes on while they are in flight.
//
//   cp_async_16(to, from, bytes);  begins a copy of 16 bytes; only `bytes` of them are read, the rest become zeros
//   cp_async_commit();             the copies begun since the last commit become a group
//   cp_async_wait_group<N>();      waits until at most the N youngest groups are in flight
//
// The wait covers the thread's own copies; what other threads copied needs a barrier after their wait. Both addresses
// are multiples of the size. With 0 bytes nothing is read, but `from` must still be an address that could be.
//
// On the host a copy fills its destination with NaN at once and is carried out by the wait, as late as a GPU could: to
// read too early, or to write again too early, shows.
#pragma once
#include "warp.cuh"

#ifdef SEGNET_HOST

namespace host {

inline void begin_copy(Place here, void* to, const void* from, int bytes) {
    if (!worker->cooperative) throw NeedsFibers();
    if (bytes < 0 || bytes > 16) fault("cp_async_16", here, "reads more bytes than it writes");
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        fault("cp_async_16", here, "has an address that is no multiple of its size");
#ifdef __SANITIZE_ADDRESS__
    // The copy itself is carried out elsewhere; a wrong address is to be reported here.
    volatile const char* source = static_cast<const char*>(from);
    for (int i = 0; i < bytes; ++i) (void)source[i];
#endif
    std::memset(to, kPoisonByte, 16);
    worker->current->copies.push_back({to, from, size_t(bytes)});
}

inline void finish_copies(size_t pending_groups) {
    Fiber* self = worker->current;
    if (self->copy_groups.size() <= pending_groups) return;
    const size_t groups = self->copy_groups.size() - pending_groups, count = self->copy_groups[groups - 1];
    for (size_t i = 0; i < count; ++i) {
        const AsyncCopy& copy = self->copies[i];
        std::memcpy(copy.to, copy.from, copy.read);
        std::memset(static_cast<char*>(copy.to) + copy.read, 0, 16 - copy.read);
    }
    self->copies.erase(self->copies.begin(), self->copies.begin() + long(count));
    self->copy_groups.erase(self->copy_groups.begin(), self->copy_groups.begin() + long(groups));
    for (size_t& end : self->copy_groups) end -= count;
}

}  // namespace host

inline void cp_async_16(void* to, const void* from, int bytes, HERE) { host::begin_copy(here, to, from, bytes); }
inline void cp_async_commit() {
    if (!host::worker->cooperative) throw host::NeedsFibers();
    host::worker->current->copy_groups.push_back(host::worker->current->copies.size());
}
template <int PENDING>
inline void cp_async_wait_group() {
    host::finish_copies(PENDING);
}

#else

__device__ inline void cp_async_16(void* to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ inline void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#endif
