// SPDX-License-Identifier: Apache-2.0
#include "write.hpp"

#include <array>
#include <vector>

#include "io.hpp"
#include "plan.hpp"

namespace flashd {

std::unique_ptr<Transfer> write(File target, uint64_t offset, std::span<std::byte> memory, const Options& options) {
    auto shared = std::make_shared<File>(std::move(target));
    return std::make_unique<Transfer>(memory.size(), [=](Transfer& transfer) {
        shared->preallocate(offset + memory.size());
        const std::array<Read, 1> whole{Read{0, offset, 0, memory.size()}};
        std::vector<Request> requests;
        // An unaligned tail goes through the page cache by itself: its length decides (File::descriptor).
        for (const Read& part : split(whole, options.block)) {
            const uint64_t body = align_down(part.length);
            std::byte* address = memory.data() + part.memory_offset;
            if (body > 0) requests.push_back({0, part.file_offset, address, body, body});
            if (const uint64_t tail = part.length - body; tail > 0)
                requests.push_back({0, part.file_offset + body, address + body, tail, tail});
        }
        execute(transfer, Direction::write, {shared.get(), 1}, requests, options, {}, {});
        shared->truncate(offset + memory.size());
        shared->sync();
    });
}

}  // namespace flashd
