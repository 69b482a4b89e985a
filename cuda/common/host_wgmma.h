// The warpgroup's matrix product on the host device (wgmma.cuh).
//
// The sums of a warpgroup leave its threads with the first product that adds to them, and come back with the wait that
// covers the last one; in between the threads hold NaN. A product is computed at that wait: then it reads its operands.
// How products are added: host_tensor_core.h.
#pragma once
#include "host_hopper.h"
#include "host_tensor_core.h"

namespace host {

// The descriptor of an operand, with what it cannot show: whether the addresses were multiples of 16.
HOST_CALL unsigned long long matrix_descriptor(const char* operation, const void* start, int leading, int stride, Place place) {
    const unsigned offset = shared_offset(operation, place, start, 16);
    for (const int distance : {leading, stride})
        if (distance < 0 || distance % 16 || distance >= 1 << 18)
            fault(operation, place, "has a distance of %d bytes; expected a multiple of 16 below 2^18", distance);
    return (unsigned long long)(offset >> 4) | (unsigned long long)(leading >> 4) << 16 | (unsigned long long)(stride >> 4) << 32 |
           1ull << 62;
}

// Calls visit(number of the piece, its shared address): piece i of a K-major operand holds 8 of depth of row i / 2, i % 2 the
// half; of an MN-major one 8 rows of one depth, i / (count / 8) the depth.
template <class Visit>
void visit_pieces(const Operand& operand, Visit visit) {
    const unsigned long long d = operand.descriptor;
    const unsigned start = unsigned(d & 0x3FFF) << 4, leading = unsigned(d >> 16 & 0x3FFF) << 4, stride = unsigned(d >> 32 & 0x3FFF) << 4;
    const unsigned count = unsigned(operand.count);
    if (operand.mn_major) {
        for (unsigned k = 0, i = 0; k < 16; ++k)
            for (unsigned row = 0; row < count; row += 8, ++i)
                visit(i, swizzled(start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2));
    } else {
        for (unsigned row = 0, i = 0; row < count; ++row)
            for (unsigned half = 0; half < 2; ++half, ++i) visit(i, swizzled(start + row / 8 * stride + row % 8 * 128 + half * 16));
    }
}

HOST_CALL void check_operand(const Operand& operand, const char* name, Place place) {
    Hopper& hopper = Hopper::get();
    const unsigned swizzle = unsigned(operand.descriptor >> 62), base = unsigned(operand.descriptor >> 49 & 7);
    if (swizzle != 1) fault("wgmma", place, "has an operand %s with swizzle mode %u; only that of 128 bytes, 1, is known here", name, swizzle);
    if (base) fault("wgmma", place, "has an operand %s with base offset %u; expected 0", name, base);
    const SharedArray* array = nullptr;
    visit_pieces(operand, [&](unsigned, unsigned address) {
        if (!array) array = array_at(address);
        if (!array || address < array->offset || address + kUnit > array->offset + array->bytes)
            fault("wgmma", place, "has an operand %s that passes the end of shared array '%s'", name, array ? array->name : "?");
        if (hopper.usage[address / kUnit].load)
            fault("wgmma", place, "reads shared array '%s' at byte %zu, to which a copy is still in flight: wait for its mbarrier",
                  array->name, address - array->offset);
        unsigned char ignored[kUnit];
        hopper.read("wgmma", place, address, ignored, kUnit);
    });
}

inline void use_operand(const Operand& operand, int change) {
    Hopper& hopper = Hopper::get();
    visit_pieces(operand, [&](unsigned, unsigned address) {
        unsigned short& products = hopper.usage[address / kUnit].products;
        products = (unsigned short)(products + change);
    });
}

// An operand as numbers: (16, count), depth by depth.
inline void load_operand(const Operand& operand, Place place, float* to) {
    const Hopper& hopper = Hopper::get();
    const unsigned count = unsigned(operand.count);
    visit_pieces(operand, [&](unsigned i, unsigned address) {
        unsigned short numbers[8];
        hopper.read("wgmma", place, address, numbers, sizeof numbers);
        for (unsigned j = 0; j < 8; ++j) {
            const unsigned row = operand.mn_major ? i % (count / 8) * 8 + j : i / 2;
            const unsigned k = operand.mn_major ? i / (count / 8) : i % 2 * 8 + j;
            to[k * count + row] = __uint_as_float(unsigned(numbers[j]) << 16);
        }
    });
}

// Where sums[i] of thread `thread` of a warpgroup lies in 64 rows of n.
inline int sum_place(int thread, int i, int n) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    return row * n + column;
}

template <int N>
void compute(const Product& product) {
    alignas(64) static thread_local float a[16 * 64], b[16 * N];
    load_operand(product.a, product.place, a);
    load_operand(product.b, product.place, b);
    float* const sums = product.sums->values.data();
    if (!product.accumulate) std::memset(sums, 0, sizeof(float) * 64 * N);
    for (int row = 0; row < 64; ++row)
        for (int column = 0; column < N; column += 8) {
            Row& sum = *reinterpret_cast<Row*>(sums + row * N + column);
            sum = tensor_core_sum<16>(sum, a + row, 64, b + column, N);
        }
}

inline void compute(const Product& product) {
    switch (product.b.count) {
        case 32: return compute<32>(product);
        case 64: return compute<64>(product);
        case 128: return compute<128>(product);
        case 192: return compute<192>(product);
    }
}

HOST_CALL void begin_product(Fragment& fragment, Operand a, Operand b, bool accumulate, Place place) {
    Hopper& hopper = Hopper::get();
    hopper.whole_warpgroup("wgmma", place);
    ThreadState& self = hopper.self();
    const unsigned thread = thread_number() % kWarpgroup;
    WarpgroupState& group = hopper.warpgroups[thread_number() / kWarpgroup];
    if (fragment.touched == self.epoch)
        fault("wgmma", place, "uses accumulators that the thread has accessed without a wgmma_fence after it");
    const size_t index = self.products++ - group.first_product;
    if (index == group.products.size()) {  // the first of the warpgroup's threads to come to this product
        check_operand(a, "a", place);
        check_operand(b, "b", place);
        use_operand(a, 1);
        use_operand(b, 1);
        std::shared_ptr<Sums> sums = fragment.pending;
        if (!sums) {
            sums = std::make_shared<Sums>();
            sums->values.resize(size_t(64) * size_t(b.count));
        }
        ++sums->products;
        group.products.emplace_back(new Product{place, a, b, accumulate, sums});
    }
    Product& product = *group.products[index];
    const bool same = product.place.line == place.line && product.a.descriptor == a.descriptor && product.b.descriptor == b.descriptor &&
                      product.accumulate == accumulate && product.b.count == b.count;
    if (!same || (fragment.pending && fragment.pending != product.sums))
        fault("wgmma", place, "differs from what another thread of the warpgroup gave to the same product, at %s: operands, "
              "accumulate or accumulators", text(product.place).of);
    if (fragment.pending) return;
    fragment.pending = product.sums;
    fragment.begun = place;
    product.sums->fragments[thread] = &fragment;
    for (int i = 0; i < fragment.count; ++i) {
        // Without accumulate whatever they hold is not looked at.
        product.sums->values[size_t(sum_place(int(thread), i, b.count))] = fragment.values[i];
        std::memset(&fragment.values[i], kPoisonByte, sizeof(float));
    }
}

inline void wgmma_fence() { ++Hopper::get().self().epoch; }

HOST_CALL void wgmma_commit(HERE) {
    Hopper& hopper = Hopper::get();
    hopper.whole_warpgroup("wgmma_commit", here);
    ThreadState& self = hopper.self();
    WarpgroupState& group = hopper.warpgroups[thread_number() / kWarpgroup];
    if (self.groups == group.group_ends.size()) group.group_ends.push_back(self.products);
    if (group.group_ends[self.groups++] != self.products)
        fault("wgmma_commit", here, "ends a group of other products than it does for another thread of the warpgroup");
}

HOST_CALL void wait_for_products(size_t pending, Place place) {
    Hopper& hopper = Hopper::get();
    const unsigned first = thread_number() / kWarpgroup * kWarpgroup;
    hopper.gather("wgmma_wait", place, [&] {
        WarpgroupState& group = hopper.warpgroups[first / kWarpgroup];
        for (unsigned i = first; i < first + kWarpgroup; ++i)
            if (hopper.threads[i].products != hopper.threads[first].products || hopper.threads[i].groups != hopper.threads[first].groups)
                fault("wgmma_wait", place, "is reached by threads of the warpgroup that have begun or committed unlike numbers of products");
        if (group.group_ends.size() <= pending) return true;
        const size_t done = group.group_ends[group.group_ends.size() - pending - 1];
        while (group.first_product < done) {
            Product& product = *group.products.front();
            compute(product);
            use_operand(product.a, -1);
            use_operand(product.b, -1);
            Sums& sums = *product.sums;
            if (--sums.products == 0)
                for (int thread = 0; thread < kWarpgroup; ++thread) {
                    Fragment& fragment = *sums.fragments[thread];
                    for (int i = 0; i < fragment.count; ++i)
                        fragment.values[i] = sums.values[size_t(sum_place(thread, i, product.b.count))];
                    fragment.pending.reset();
                }
            group.products.erase(group.products.begin());
            ++group.first_product;
        }
        return true;
    });
}

HOST_CALL void Fragment::report_access(Place place) const {
    fault("access to accumulators", place, "before a wgmma_wait covers the product begun at %s", text(begun).of);
}

// An index with the place where it was written.
struct Index {
    int value;
    Place place;
    Index(int value, Place place = {__builtin_FILE(), __builtin_LINE()}) : value(value), place(place) {}
};

}  // namespace host
