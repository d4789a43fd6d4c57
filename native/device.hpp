// SPDX-License-Identifier: Apache-2.0
// Transfers to and from a device's memory.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "digest.hpp"
#include "driver.hpp"
#include "file.hpp"
#include "staging.hpp"
#include "transfer.hpp"

namespace flashd {

// Reads [start, start + length) of a file through the staging memory: reads, copies and digests overlap. Blocks of
// digests must be as large as those of the staging memory.
std::unique_ptr<Transfer> load_device(File file, uint64_t start, uint64_t length, Driver::Address target,
                                      DigestTable digests, std::shared_ptr<Staging> staging, const Options& options);

// Writes device memory to a file, which is cut to the end of the memory and fsynced. The result has the digest of each
// block, as large as those of the staging memory.
std::unique_ptr<Transfer> write_device(File target, uint64_t offset, Driver::Address source, uint64_t length,
                                       std::shared_ptr<Staging> staging, const Options& options);

// Copies host memory to a device, or back: registered memory in a few large copies, other memory through the staging
// memory with `options.copy_threads` threads.
std::unique_ptr<Transfer> upload(std::span<std::byte> memory, Driver::Address target, bool registered,
                                 std::shared_ptr<Staging> staging, const Options& options);
std::unique_ptr<Transfer> download(Driver::Address source, std::span<std::byte> memory, bool registered,
                                   std::shared_ptr<Staging> staging, const Options& options);

}  // namespace flashd
