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
        const auto requests = requests_for(split(whole, options.block), memory);
        execute(transfer, Direction::write, {shared.get(), 1}, requests, options, memory, {});
        shared->truncate(offset + memory.size());
        shared->sync();
    });
}

}  // namespace flashd
