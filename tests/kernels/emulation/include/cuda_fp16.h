// __half for the emulation: 16 bits, converted in software, to nearest with ties to even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
    __half() = default;
    __half(float x) {
        uint32_t u;
        std::memcpy(&u, &x, 4);
        const uint16_t sign = u >> 16 & 0x8000;
        u &= 0x7fffffff;
        if (u > 0x7f800000) bits = sign | 0x7e00;
        else if (u >= 0x477ff000) bits = sign | 0x7c00;  // rounds to infinity
        else if (u < 0x38800000) {                       // below 2^-14: steps of 2^-24
            float magnitude;
            std::memcpy(&magnitude, &u, 4);
            bits = sign | uint16_t(std::nearbyint(magnitude * 16777216.0f));
        } else bits = sign | uint16_t((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
    }
    operator float() const {
        const int exponent = bits >> 10 & 31, fraction = bits & 1023;
        const float sign = bits & 0x8000 ? -1.0f : 1.0f;
        if (exponent == 31) return fraction ? NAN : sign * INFINITY;
        return sign * (exponent ? std::ldexp(float(fraction + 1024), exponent - 25) : std::ldexp(float(fraction), -24));
    }
};
struct alignas(4) __half2 { __half x, y; };

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
