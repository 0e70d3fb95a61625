/* What an agent does for its machine: come to itself after a restore, become small before a template is saved, tell
   the frequency of its time stamp counter. */
#include "machine.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* random(4); its header is none of musl's */
#define ADD_ENTROPY _IOW('R', 0x03, int[2])
#define RESEED _IO('R', 0x07)

enum { ENTROPY_MIN = 16, ENTROPY_MAX = 512, TSC_MEASURE_MS = 100, LONG_MS = 3600000 };
#define NS 1000000000ll

bool machine_is_ours;

static bool failed(Failure *f, const char *what)
{
    int e = errno;
    failure_set(f, "resume", e, 0, "%s: %s", what, strerror(e));
    return false;
}

/* With credit, then a reseed: without the second the generator would go on with the template's key for a while, and
   two clones would give the same numbers (random(4)). */
static bool reseed(Span entropy, Failure *f)
{
    struct {
        int bits, bytes;
        uint8_t data[ENTROPY_MAX];
    } pool = {.bits = (int)entropy.n * 8, .bytes = (int)entropy.n};
    memcpy(pool.data, entropy.p, entropy.n);
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return failed(f, "/dev/urandom");
    bool fine = !ioctl(fd, ADD_ENTROPY, &pool) && !ioctl(fd, RESEED);
    if (!fine)
        failed(f, "reseeding");
    close(fd);
    explicit_bzero(&pool, sizeof pool);
    return fine;
}

static bool set_clock(int64_t ns, Failure *f)
{
    struct timespec t = {.tv_sec = ns / NS, .tv_nsec = ns % NS};
    return !clock_settime(CLOCK_REALTIME, &t) || failed(f, "setting the clock");
}

static bool forget_blocks(const char *device, Failure *f)
{
    int fd = open(device, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return failed(f, device);
    bool fine = !ioctl(fd, BLKFLSBUF, 0) || failed(f, device);
    close(fd);
    return fine;
}

/* Once: a template brings it up for its clones. What is done with it later is the business of whoever does it. */
static bool loopback_up(Failure *f)
{
    static bool done;
    if (done)
        return true;
    struct ifreq r = {.ifr_name = "lo"};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return failed(f, "a socket");
    bool fine = !ioctl(fd, SIOCGIFFLAGS, &r);
    r.ifr_flags |= IFF_UP;
    fine = (fine && !ioctl(fd, SIOCSIFFLAGS, &r)) || failed(f, "lo");
    close(fd);
    return done = fine;
}

/* The template's address travels in the saved state of the network card, so every clone has it (virtio-net). A machine
   without a card has nothing to be told. */
static bool own_address(const char *text, Failure *f)
{
    struct ifreq r = {.ifr_name = "eth0"};
    unsigned byte[6];
    if (sscanf(text, "%2x:%2x:%2x:%2x:%2x:%2x", byte, byte + 1, byte + 2, byte + 3, byte + 4, byte + 5) != 6) {
        failure_set(f, "resume", EINVAL, 0, "this is no address of a network card");
        return false;
    }
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return failed(f, "a socket");
    r.ifr_hwaddr.sa_family = ARPHRD_ETHER;
    for (int i = 0; i < 6; i++)
        r.ifr_hwaddr.sa_data[i] = (char)byte[i];
    bool fine = !ioctl(fd, SIOCSIFHWADDR, &r) || errno == ENODEV || failed(f, "eth0");
    close(fd);
    return fine;
}

/* Of the whole machine: in it there is nothing but the application, and what was started beside it. */
static uint64_t oom_kills(void)
{
    char text[8192];
    const char *line = read_small("/proc/vmstat", text, sizeof text) > 0 ? strstr(text, "\noom_kill ") : NULL;
    return line ? strtoull(line + 10, NULL, 10) : 0;
}

static uint64_t oom_kills_before; /* in the machine that this one is a copy of */

bool lacked_memory(void) { return oom_kills() > oom_kills_before; }

static bool resume(Span body, Failure *f)
{
    Span entropy, value;
    if (!field_find(body, T_DATA, &entropy) || entropy.n < ENTROPY_MIN || entropy.n > ENTROPY_MAX) {
        failure_set(f, "resume", EINVAL, 0, "16 to 512 bytes of entropy are needed");
        return false;
    }
    if (!reseed(entropy, f))
        return false;
    if (field_find(body, T_TIME, &value) && !set_clock(span_int(value), f))
        return false;
    const char *host = field_text(body, T_HOST);
    if (*host && sethostname(host, strlen(host)))
        return failed(f, "the host name");
    const char *address = field_text(body, T_OPTIONS);
    if (*address && !own_address(address, f))
        return false;
    for (char **path = field_list(body, T_PATH); *path; path++)
        if (!forget_blocks(*path, f))
            return false;
    oom_kills_before = oom_kills();
    return loopback_up(f);
}

/* What was read of a disk before it was the clone's. */
static void forget_disks(void)
{
    Failure ignored;
    DIR *d = opendir("/sys/block");
    for (struct dirent *e; d && (e = readdir(d));) {
        char path[64];
        snprintf(path, sizeof path, "/dev/%.32s", e->d_name);
        if (e->d_name[0] == 'v')
            forget_blocks(path, &ignored);
    }
    if (d)
        closedir(d);
}

/* Twice: inodes that the first pass frees let go of pages and of blocks that only the second can take. */
static void settle(bool keeps_cache)
{
    Failure ignored;
    loopback_up(&ignored);
    sync();
    for (int i = 0; i < 2 && !keeps_cache; i++)
        write_file("/proc/sys/vm/drop_caches", "3");
    if (!keeps_cache)
        forget_disks();
}

void idle_answer(Peer *who, uint32_t id)
{
    Buf body = {0};
    put_int(&body, T_COUNT, idle_ms());
    peer_reply(who, K_OK, id, &body);
}

static bool rests(int64_t left_ms) { return left_ms == -1 || left_ms >= LONG_MS; }

static void answer_idle(Peer *who, const Frame *f)
{
    if (field_int(f->body, T_OP, 0) != 1 || !rests(idle_ms()) || !exercise(who, f->id))
        idle_answer(who, f->id);
}

static void answer_resume(Peer *who, const Frame *f)
{
    Failure why = {0};
    Buf body = {0};
    if (resume(f->body, &why)) {
        reply_ok(who, f->id);
        return;
    }
    put_failure(&body, &why, NULL, 0);
    peer_reply(who, K_ERROR, f->id, &body);
}

bool machine_request(Peer *who, Frame *f)
{
    if (f->kind == K_IDLE) {
        answer_idle(who, f);
    } else if (f->kind != K_RESUME && f->kind != K_SETTLE) {
        return false;
    } else if (!machine_is_ours) {
        reply_error(who, f->id, "machine", EPERM, "the machine that this agent runs on is not its own");
    } else if (f->kind == K_RESUME) {
        answer_resume(who, f);
    } else {
        settle(field_int(f->body, T_OP, 0) == 1);
        reply_ok(who, f->id);
    }
    return true;
}

#if defined __x86_64__ || defined __i386__
static int64_t raw_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_RAW, &t);
    return t.tv_sec * NS + t.tv_nsec;
}

/* Both clocks as close together as in the quickest of a few tries: being scheduled away between them would show. */
static void both_clocks(int64_t *ns, uint64_t *ticks)
{
    int64_t best = INT64_MAX;
    for (int i = 0; i < 16; i++) {
        int64_t before = raw_ns();
        uint64_t now = __builtin_ia32_rdtsc();
        int64_t after = raw_ns();
        if (after - before < best) {
            best = after - before;
            *ns = before + best / 2;
            *ticks = now;
        }
    }
}

static int64_t tsc_khz(void)
{
    int64_t ns[2];
    uint64_t ticks[2];
    both_clocks(&ns[0], &ticks[0]);
    sleep_ms(TSC_MEASURE_MS);
    both_clocks(&ns[1], &ticks[1]);
    return (int64_t)((double)(ticks[1] - ticks[0]) * 1e6 / (double)(ns[1] - ns[0]) + 0.5);
}
#else
static int64_t tsc_khz(void) { return 0; }
#endif

int print_tsc_khz(void)
{
    int64_t khz = tsc_khz();
    printf("%lld\n", (long long)khz);
    return khz > 0 ? 0 : 1;
}
