// Tile registers of AMX for tests: generated sources compile against this header (gcc -include) on processors without them.
//
// Each thread has eight tiles and a configuration of its own. What the processor answers with an invalid opcode or a fault
// is recorded as a fault here: tiles used before they are configured or after they are released, shapes that do not agree,
// a configuration that no palette allows, a process that never asked for the registers. Arithmetic follows Intel's manual:
// TDPBF16PS sums even and odd products apart, rounds to nearest even and takes denormals for zeros, on both sides; TDPBUSD
// adds four products of an unsigned and a signed byte in 32 bits. Loads read row by row, no byte more than the shape says.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define EMULATION_EXPORT __attribute__((visibility("default")))

typedef struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } emulated_config_t;

static _Thread_local struct {
  emulated_config_t config;
  int configured;
  uint8_t data[8][16][64];
} emulated;
static char emulated_fault[160];
static int emulated_lent, emulated_refused, emulated_open, emulated_products, emulated_asked;

static void emulated_wrong(const char *what, int tile) {
  if (emulated_fault[0] == 0) snprintf(emulated_fault, sizeof emulated_fault, "%s (tile %d)", what, tile);
}

/* The first fault since this was last asked; empty when there was none. */
EMULATION_EXPORT void amx_fault(char *to, int size) {
  snprintf(to, (size_t)size, "%s", emulated_fault);
  emulated_fault[0] = 0;
}
/* Threads that have configured tiles and not released them; products since this was last asked; requests for permission. */
EMULATION_EXPORT int amx_open(void) { return emulated_open; }
EMULATION_EXPORT int amx_products(void) { return __atomic_exchange_n(&emulated_products, 0, __ATOMIC_RELAXED); }
EMULATION_EXPORT int amx_asked(void) { return emulated_asked; }
/* Whether the system refuses from here on; a kernel that has asked before keeps its answer. */
EMULATION_EXPORT void amx_refuse(int yes) { emulated_refused = yes; }

static long emulated_syscall(long number, long code, long feature) {
  if (number != SYS_arch_prctl || code != 0x1023 || feature != 18) emulated_wrong("another system call", -1);
  __atomic_fetch_add(&emulated_asked, 1, __ATOMIC_RELAXED);
  if (emulated_refused) return -1;
  return emulated_lent = 1, 0;
}

static void emulated_loadconfig(const void *from) {
  emulated_config_t c;
  memcpy(&c, from, sizeof c);
  if (!emulated_lent) emulated_wrong("configured without permission", -1);
  if (c.palette != 1 || c.start != 0) emulated_wrong("no configuration of palette 1", -1);
  for (int i = 0; i < 14; i++) if (c.reserved[i]) emulated_wrong("reserved bytes are not zero", i);
  for (int t = 0; t < 16; t++) {
    if (c.rows[t] > 16 || c.bytes[t] > 64 || !c.rows[t] != !c.bytes[t]) emulated_wrong("rows or bytes out of range", t);
    if (t >= 8 && (c.rows[t] || c.bytes[t])) emulated_wrong("there are eight tiles", t);
  }
  if (!emulated.configured) __atomic_fetch_add(&emulated_open, 1, __ATOMIC_RELAXED);
  emulated.config = c;
  emulated.configured = 1;
  memset(emulated.data, 0, sizeof emulated.data);
}

static void emulated_release(void) {
  if (!emulated.configured) emulated_wrong("released without a configuration", -1);
  else __atomic_fetch_sub(&emulated_open, 1, __ATOMIC_RELAXED);
  emulated.configured = 0;
  memset(emulated.data, 0xa5, sizeof emulated.data);
}

static int emulated_usable(int t) {
  if (t < 0 || t > 7 || !emulated.configured || !emulated.config.rows[t]) {
    emulated_wrong("a tile that is not configured", t);
    return 0;
  }
  return 1;
}

static void emulated_zero(int t) {
  if (emulated_usable(t)) memset(emulated.data[t], 0, sizeof emulated.data[t]);
}

static void emulated_loadd(int t, const void *base, ptrdiff_t stride) {
  if (!emulated_usable(t)) return;
  memset(emulated.data[t], 0, sizeof emulated.data[t]);
  for (int r = 0; r < emulated.config.rows[t]; r++)
    memcpy(emulated.data[t][r], (const char *)base + r * stride, emulated.config.bytes[t]);
}

static void emulated_stored(int t, void *base, ptrdiff_t stride) {
  if (!emulated_usable(t)) return;
  for (int r = 0; r < emulated.config.rows[t]; r++)
    memcpy((char *)base + r * stride, emulated.data[t][r], emulated.config.bytes[t]);
}

/* Whether the shapes of d += a b agree: a is (rows of d, rows of b * 4 bytes), b as wide as d. */
static int emulated_agree(int d, int a, int b) {
  if (!emulated_usable(d) || !emulated_usable(a) || !emulated_usable(b)) return 0;
  const emulated_config_t *c = &emulated.config;
  if (d == a || d == b || a == b) emulated_wrong("operands are not three tiles", d);
  else if (c->rows[d] != c->rows[a] || c->bytes[d] != c->bytes[b] || c->bytes[a] != 4 * c->rows[b]) emulated_wrong("shapes do not agree", d);
  else if (c->bytes[d] % 4) emulated_wrong("sums take four bytes each", d);
  else return __atomic_fetch_add(&emulated_products, 1, __ATOMIC_RELAXED), 1;
  return 0;
}

static float emulated_flush(float s) { return fpclassify(s) == FP_SUBNORMAL ? copysignf(0.0f, s) : s; }

static float emulated_bf16(const uint8_t *p) {
  uint16_t half;
  memcpy(&half, p, sizeof half);
  const uint32_t bits = (uint32_t)half << 16;
  float s;
  memcpy(&s, &bits, sizeof s);
  return emulated_flush(s);
}

static void emulated_dpbf16ps(int d, int a, int b) {
  if (!emulated_agree(d, a, b)) return;
  for (int m = 0; m < emulated.config.rows[d]; m++)
    for (int n = 0; n < emulated.config.bytes[d] / 4; n++) {
      float even = 0.0f, odd = 0.0f, sum;
      for (int k = 0; k < emulated.config.rows[b]; k++) {
        even = emulated_flush(fmaf(emulated_bf16(&emulated.data[a][m][4 * k]), emulated_bf16(&emulated.data[b][k][4 * n]), even));
        odd = emulated_flush(fmaf(emulated_bf16(&emulated.data[a][m][4 * k + 2]), emulated_bf16(&emulated.data[b][k][4 * n + 2]), odd));
      }
      memcpy(&sum, &emulated.data[d][m][4 * n], sizeof sum);
      sum = emulated_flush(emulated_flush(sum) + emulated_flush(even + odd));
      memcpy(&emulated.data[d][m][4 * n], &sum, sizeof sum);
    }
}

static void emulated_dpbusd(int d, int a, int b) {
  if (!emulated_agree(d, a, b)) return;
  for (int m = 0; m < emulated.config.rows[d]; m++)
    for (int n = 0; n < emulated.config.bytes[d] / 4; n++) {
      int32_t sum;
      memcpy(&sum, &emulated.data[d][m][4 * n], sizeof sum);
      for (int k = 0; k < emulated.config.rows[b]; k++)
        for (int j = 0; j < 4; j++)
          sum = (int32_t)((uint32_t)sum + (uint32_t)(emulated.data[a][m][4 * k + j] * (int8_t)emulated.data[b][k][4 * n + j]));
      memcpy(&emulated.data[d][m][4 * n], &sum, sizeof sum);
    }
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define syscall emulated_syscall
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbf16ps emulated_dpbf16ps
#define _tile_dpbusd emulated_dpbusd
