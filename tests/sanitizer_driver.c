/* Runs one generated kernel on tensors from a file, every one of them between two unreadable pages.

   The kernel's source is included, so that a sanitizer sees all of it. GOMP_parallel runs on pthreads, because an
   OpenMP runtime that was not built with the sanitizer reports races of its own. Usage: driver IN OUT THREADS LOW
   IN: int32 count, then per tensor int32 code, bits, ndim, int64 shape[ndim], its bytes; tensor OUTPUT is the output, a
   code of -1 stands for None, and -2 for an int64 that follows the head. OUT receives the output. LOW 1 puts tensors at
   the start of their pages, 0 at the end. */
#define _GNU_SOURCE
#ifndef OUTPUT
#define OUTPUT 1
#endif
#ifdef FAIL_ALLOCATIONS /* the allocation whose number is in the environment fails */
#include <stdlib.h>
static long allocations;
static int fails(void) {
  const char *at = getenv("FAIL_AT");
  return at && __atomic_add_fetch(&allocations, 1, __ATOMIC_RELAXED) == atol(at);
}
static void *failing_aligned(size_t align, size_t bytes) { return fails() ? NULL : aligned_alloc(align, bytes); }
static inline void *failing_malloc(size_t bytes) { return fails() ? NULL : malloc(bytes); }
#define aligned_alloc failing_aligned
#define malloc failing_malloc
#endif
#include KERNEL_SOURCE
#undef aligned_alloc
#undef malloc

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>
static unsigned control(void) { return _mm_getcsr() & ~0x3fu; } /* without the sticky exception flags */
#else
static unsigned control(void) { return 0; }
#endif

static int wanted_threads = 1;
static __thread int my_number, my_team = 1;
static __thread unsigned my_control;
static pthread_barrier_t my_barrier; /* of the one team at a time */

typedef struct {
  void (*body)(void *);
  void *data;
  int number, team, changed;
} share_t;

static void *run_one(void *argument) {
  share_t *share = argument;
  my_number = share->number;
  my_team = share->team;
  my_control = control();
  share->body(share->data);
  share->changed = control() != my_control;
  return NULL;
}

void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags) {
  (void)flags;
  int team = threads ? (int)threads : wanted_threads;
  pthread_t ids[64];
  share_t shares[64];
  if (team > 64) team = 64;
  if (pthread_barrier_init(&my_barrier, NULL, (unsigned)team)) abort();
  for (int i = 0; i < team; i++) {
    shares[i] = (share_t){body, data, i, team, 0};
    if (pthread_create(&ids[i], NULL, run_one, &shares[i])) abort();
  }
  for (int i = 0; i < team; i++) {
    pthread_join(ids[i], NULL);
    if (shares[i].changed) {
      fprintf(stderr, "the floating-point control word changed in thread %d\n", i);
      exit(4);
    }
  }
  pthread_barrier_destroy(&my_barrier);
}
int omp_get_thread_num(void) { return my_number; }
int omp_get_num_threads(void) { return my_team; }
int omp_get_max_threads(void) { return wanted_threads; }
int omp_in_parallel(void) { return my_team > 1; }
void GOMP_barrier(void) {
  if (my_team > 1) pthread_barrier_wait(&my_barrier);
}

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) { fprintf(stderr, "%s: %s\n", kind, message); }

static char *fenced(size_t bytes, int low) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page + (bytes == 0) * page;
  char *area = mmap(NULL, whole + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (area == MAP_FAILED) abort();
  memset(area + page, 0xa5, whole);
  mprotect(area, page, PROT_NONE);
  mprotect(area + page + whole, page, PROT_NONE);
  return area + page + (low ? 0 : whole - bytes);
}

static void get(void *to, size_t bytes, FILE *file) {
  if (bytes && fread(to, bytes, 1, file) != 1) exit(3);
}

int main(int argc, char **argv) {
  if (argc != 5) return 2;
  wanted_threads = atoi(argv[3]);
  const int low = atoi(argv[4]);
  FILE *file = fopen(argv[1], "rb");
  int32_t count;
  if (!file) return 2;
  get(&count, 4, file);
  static TVMFFIAny args[32], result;
  static DLTensor tensors[32];
  static int64_t shapes[32][8];
  size_t sizes[32] = {0};
  for (int i = 0; i < count && i < 32; i++) {
    int32_t head[3];
    get(head, sizeof head, file);
    args[i].type_index = head[0] == -2 ? kTVMFFIInt : kTVMFFINone;
    if (head[0] == -2) get(&args[i].v_int64, 8, file);
    if (head[0] < 0) continue;
    size_t bytes = (size_t)head[1] / 8;
    for (int d = 0; d < head[2]; d++) {
      get(&shapes[i][d], 8, file);
      bytes *= (size_t)shapes[i][d];
    }
    tensors[i] = (DLTensor){.data = fenced(bytes, low), .device = {kDLCPU, 0}, .ndim = head[2],
                            .dtype = {(uint8_t)head[0], (uint8_t)head[1], 1}, .shape = shapes[i]};
    get(tensors[i].data, bytes, file);
    sizes[i] = bytes;
    args[i].type_index = kTVMFFIDLTensorPtr;
    args[i].v_ptr = &tensors[i];
  }
  fclose(file);
  const unsigned before = control();
  if (ENTRY_POINT(NULL, args, count, &result)) return 5;
  if (control() != before) {
    fprintf(stderr, "the floating-point control word changed\n");
    return 4;
  }
  FILE *out = fopen(argv[2], "wb");
  if (!out || (sizes[OUTPUT] && fwrite(tensors[OUTPUT].data, sizes[OUTPUT], 1, out) != 1)) return 3;
  return fclose(out);
}
