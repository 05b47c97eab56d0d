// A checksum of the bits of a tensor: not for security, but no single change of a word escapes it,
// nor do words that change places.
#pragma once

#include <cstdint>

namespace rmr1 {

std::uint64_t checksum(const unsigned char* bytes, std::int64_t count, int threads);

}  // namespace rmr1
