/* What the processor can do at best: multiply-adds in registers, and reads from each level of memory. */
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))

#if defined(__AVX512F__)
#include <immintrin.h>
enum { LANES = 16 };
typedef __m512 vec;
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define ADD(a, b) _mm512_add_ps(a, b)
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
enum { LANES = 8 };
typedef __m256 vec;
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define ADD(a, b) _mm256_add_ps(a, b)
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#else
enum { LANES = 4 };
typedef float vec __attribute__((vector_size(16), aligned(4), may_alias));
#define FMA(a, b, c) ((a) * (b) + (c))
#define ADD(a, b) ((a) + (b))
#define LOAD(p) (*(const vec *)(p))
#define STORE(p, v) (*(vec *)(p) = (v))
#endif

API int32_t lanes(void) { return LANES; }

/* 12 independent chains of multiply-adds, `count` long. data holds 14 vectors and receives one; each chain has its own
   start, because a compiler makes one chain of equal ones. */
API void multiply_add(float *data, int64_t count) {
  const vec m = LOAD(data), c = LOAD(data + LANES);
  const float *starts = data + 2 * LANES;
  vec a0 = LOAD(starts), a1 = LOAD(starts + LANES), a2 = LOAD(starts + 2 * LANES), a3 = LOAD(starts + 3 * LANES);
  vec a4 = LOAD(starts + 4 * LANES), a5 = LOAD(starts + 5 * LANES), a6 = LOAD(starts + 6 * LANES);
  vec a7 = LOAD(starts + 7 * LANES), a8 = LOAD(starts + 8 * LANES), a9 = LOAD(starts + 9 * LANES);
  vec a10 = LOAD(starts + 10 * LANES), a11 = LOAD(starts + 11 * LANES);
  for (int64_t i = 0; i < count; i++) {
    a0 = FMA(a0, m, c), a1 = FMA(a1, m, c), a2 = FMA(a2, m, c), a3 = FMA(a3, m, c);
    a4 = FMA(a4, m, c), a5 = FMA(a5, m, c), a6 = FMA(a6, m, c), a7 = FMA(a7, m, c);
    a8 = FMA(a8, m, c), a9 = FMA(a9, m, c), a10 = FMA(a10, m, c), a11 = FMA(a11, m, c);
  }
  a0 = ADD(ADD(ADD(a0, a1), ADD(a2, a3)), ADD(ADD(a4, a5), ADD(a6, a7)));
  STORE(data, ADD(a0, ADD(ADD(a8, a9), ADD(a10, a11))));
}

/* Sums `count` floats `repeats` times into sink; count is a multiple of 8 vectors. */
API void read_all(const float *data, int64_t count, int64_t repeats, float *sink) {
  vec s0 = LOAD(sink), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
  for (int64_t r = 0; r < repeats; r++) {
    for (int64_t i = 0; i < count; i += 8 * LANES) {
      const float *p = data + i;
      s0 = ADD(s0, LOAD(p)), s1 = ADD(s1, LOAD(p + LANES));
      s2 = ADD(s2, LOAD(p + 2 * LANES)), s3 = ADD(s3, LOAD(p + 3 * LANES));
      s4 = ADD(s4, LOAD(p + 4 * LANES)), s5 = ADD(s5, LOAD(p + 5 * LANES));
      s6 = ADD(s6, LOAD(p + 6 * LANES)), s7 = ADD(s7, LOAD(p + 7 * LANES));
    }
  }
  STORE(sink, ADD(ADD(ADD(s0, s1), ADD(s2, s3)), ADD(ADD(s4, s5), ADD(s6, s7))));
}
