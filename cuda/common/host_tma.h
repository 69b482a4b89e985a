// The tensor memory accelerator on the host device (tma.cuh): boxes from global to shared memory.
#pragma once
#include "host_hopper.h"

namespace host {

inline const MapFields& fields_of(const char* operation, const void* map, Place place) {
    const MapFields& fields = *static_cast<const MapFields*>(map);
    if (fields.magic != kMapMagic) fault(operation, place, "has a tensor map that was not made for the host device");
    return fields;
}

// Calls visit(bytes from the start of the box in shared memory, address in global memory or null) for every number of a box,
// in the order in which they lie in shared memory.
template <class Visit>
void visit_box(const Transfer& t, Visit visit) {
    const MapFields& m = t.map;
    auto inside = [&](int d, long long i) { return i >= 0 && i < (long long)m.sizes[d]; };
    unsigned at = 0;
    auto run = [&](bool exists, const char* row, long long first, unsigned numbers) {
        for (unsigned i = 0; i < numbers; ++i, at += m.element)
            visit(at, exists && inside(0, first + i) ? row + (first + i) * m.element : nullptr);
    };
    const char* const base = reinterpret_cast<const char*>(m.address);
    if (m.im2col) {
        long long x = t.corner[1], y = t.corner[2], image = t.corner[3];
        for (unsigned pixel = 0; pixel < m.box[1]; ++pixel) {
            const long long column = x + t.tap[0], row = y + t.tap[1];
            const bool exists = inside(1, column) && inside(2, row) && inside(3, image);
            run(exists, base + column * (long long)m.strides[0] + row * (long long)m.strides[1] + image * (long long)m.strides[2],
                t.corner[0], m.box[0]);
            if (++x < (long long)m.sizes[1] + m.upper[0]) continue;
            x = m.lower[0];
            if (++y < (long long)m.sizes[2] + m.upper[1]) continue;
            y = m.lower[1];
            ++image;
        }
        return;
    }
    unsigned rows = 1;
    for (int d = 1; d < m.rank; ++d) rows *= m.box[d];
    for (unsigned number = 0; number < rows; ++number) {
        bool exists = true;
        const char* row = base;
        unsigned left = number;
        for (int d = 1; d < m.rank; left /= m.box[d++]) {
            const long long i = t.corner[d] + (long long)(left % m.box[d]);
            exists &= inside(d, i);
            row += i * (long long)m.strides[d - 1];
        }
        run(exists, row, t.corner[0], m.box[0]);
    }
}

inline unsigned box_bytes(const MapFields& m) {
    unsigned bytes = m.element;
    for (int d = 0; d < (m.im2col ? 2 : m.rank); ++d) bytes *= m.box[d];
    return bytes;
}

// A transfer that begins: what is wrong with it is found here.
HOST_CALL std::unique_ptr<Transfer> transfer(const char* operation, const void* map, const int* corner, int rank, const void* shared,
                                             Place place, bool im2col = false) {
    const MapFields& fields = fields_of(operation, map, place);
    if (fields.rank != rank) fault(operation, place, "has %d coordinates; its map has %d dimensions", rank, int(fields.rank));
    if (fields.im2col != im2col)
        fault(operation, place, im2col ? "has a map of boxes, not of im2col" : "has a map of im2col, not of boxes");
    std::unique_ptr<Transfer> t(new Transfer());
    t->operation = operation;
    t->place = place;
    t->map = fields;
    for (int d = 0; d < rank; ++d) t->corner[d] = corner[d];
    t->offset = shared_offset(operation, place, shared, 128);
    t->bytes = box_bytes(fields);
    const SharedArray* const array = array_at(t->offset);
    if (!array || t->offset + t->bytes > array->offset + array->bytes)
        fault(operation, place, "has a box of %u bytes, which passes the end of shared array '%s'", t->bytes, array ? array->name : "?");
    return t;
}

HOST_CALL void begin_load(std::unique_ptr<Transfer> t, const void* full) {
    Hopper& hopper = Hopper::get();
    const char* const operation = t->operation;
    const Place place = t->place;
    t->barrier = &hopper.barrier_at(operation, place, full);
    if (!t->barrier->fenced)
        fault(operation, place, "uses an mbarrier without mbarrier_init_fence after its initialisation");
    for (unsigned unit = t->offset / kUnit; unit < (t->offset + t->bytes) / kUnit; ++unit) {
        Usage& use = hopper.usage[unit];
        if (use.products || use.load)
            fault(operation, place, "overwrites a place which %s: byte %u of its box",
                  use.load ? "another copy in flight is writing" : "a product still reads (no wgmma_wait has covered it)",
                  unit * kUnit - t->offset);
        use.load = true;
    }
    const std::vector<unsigned char> poison(t->bytes, kPoisonByte);
    hopper.write(t->offset, poison.data(), t->bytes);
    forbid(worker->arena_base + t->offset, t->bytes);
    hopper.loads.push_back(std::move(t));
    hopper.maybe_early();
}

HOST_UNCHECKED inline bool still_poisoned(unsigned offset, unsigned bytes) {
    for (unsigned i = 0; i < bytes; ++i)
        if (worker->arena_base[offset + i] != kPoisonByte) return false;
    return true;
}

inline void Hopper::arrive(unsigned i) {
    const std::unique_ptr<Transfer> t = std::move(loads[i]);
    loads.erase(loads.begin() + i);
    if (!still_poisoned(t->offset, t->bytes)) fault(t->operation, t->place, "brings a box to a place that threads wrote in the meantime");
    allow(worker->arena_base + t->offset, t->bytes);
    std::vector<unsigned char> box(t->bytes);
    const unsigned element = t->map.element;
    visit_box(*t, [&](unsigned at, const char* from) {
        if (from) std::memcpy(box.data() + at, from, element);
    });
    for (unsigned at = 0; at < t->bytes; at += kUnit) {
        write(swizzled(t->offset + at), box.data() + at, kUnit);
        usage[(t->offset + at) / kUnit].load = false;
    }
    Barrier& barrier = *t->barrier;
    barrier.bytes -= t->bytes;
    if (barrier.pending == 0 && barrier.bytes < 0)
        fault(t->operation, t->place, "brings %lld bytes more than were announced to its mbarrier", -barrier.bytes);
    complete_if_done(barrier);
}

HOST_CALL void begin_load_im2col(const void* map, const int* pixel, const int* tap, const void* to, const void* full, Place place) {
    const char* const operation = "tma_load_im2col";
    std::unique_ptr<Transfer> t = transfer(operation, map, pixel, 4, to, place, true);
    const MapFields& m = t->map;
    for (int d = 0; d < 2; ++d) {
        const int first = m.lower[d], end = int(m.sizes[1 + d]) + m.upper[d];
        if (pixel[1 + d] < first || pixel[1 + d] >= end)
            fault(operation, place, "begins at %c = %d, outside the pixels of its map, %d to %d", "xy"[d], pixel[1 + d], first, end - 1);
        if (tap[d] < 0 || tap[d] > 255) fault(operation, place, "has the offset %d; 0 to 255 are possible", tap[d]);
        t->tap[d] = tap[d];
    }
    begin_load(std::move(t), full);
}

}  // namespace host
