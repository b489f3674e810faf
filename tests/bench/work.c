// What a Linux guest does for the bench. Each kind of work says when it begins and when it is done, by the serial port, so
// that whoever listens there takes the time by one clock for all systems. Static: the guest has no libraries.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { READ_BYTES = 1 << 20, SEND_BYTES = 64 << 10, TABLE_WORDS = 1 << 12, STEPS = 1 << 16 };

static void say(const char *text)
{
    if (write(1, text, strlen(text)) < 0)
        exit(1);
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static uint64_t cpu(uint64_t rounds)
{
    static uint64_t table[TABLE_WORDS];
    uint64_t x = 88172645463325252u;

    for (uint64_t i = 0; i < rounds * STEPS; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        table[x % TABLE_WORDS] += x;
    }
    return table[0];
}

// O_DIRECT: every byte comes from the disk, not from the guest's own cache.
static void read_disk(const char *path, uint64_t mib)
{
    int fd = open(path, O_RDONLY | O_DIRECT);
    void *into = aligned_alloc(READ_BYTES, READ_BYTES);

    if (fd < 0 || !into)
        fail("open");
    for (uint64_t i = 0; i < mib; i++)
        if (pread(fd, into, READ_BYTES, (off_t)(i * READ_BYTES)) != READ_BYTES)
            fail("read");
}

static void send_all(const char *address, uint16_t port, uint64_t mib)
{
    static uint8_t from[SEND_BYTES];
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);

    if (fd < 0 || inet_pton(AF_INET, address, &to.sin_addr) != 1 || connect(fd, (void *)&to, sizeof(to)) < 0)
        fail("connect");
    for (uint64_t left = mib << 20; left;) {
        ssize_t n = send(fd, from, left < SEND_BYTES ? left : SEND_BYTES, 0);
        if (n <= 0)
            fail("send");
        left -= (uint64_t)n;
    }
    // The other end closes once it has all of it.
    if (shutdown(fd, SHUT_WR) < 0 || read(fd, from, 1) != 0)
        fail("close");
}

static void beat(useconds_t period_us)
{
    for (uint64_t n = 1;; n++) {
        char line[32];
        snprintf(line, sizeof(line), "H 0 %lu\n", (unsigned long)n);
        say(line);
        usleep(period_us);
    }
}

int main(int argc, char **argv)
{
    uint64_t number = argc > 2 ? strtoull(argv[2], NULL, 0) : 0;

    if (!number)
        return 2;
    say("WORK\n");
    if (!strcmp(argv[1], "cpu")) {
        volatile uint64_t kept = cpu(number);
        (void)kept;
    } else if (!strcmp(argv[1], "read") && argc > 3) {
        read_disk(argv[3], number);
    } else if (!strcmp(argv[1], "send") && argc > 4) {
        send_all(argv[3], (uint16_t)atoi(argv[4]), number);
    } else if (!strcmp(argv[1], "beat")) {
        beat((useconds_t)number);
    } else {
        return 2;
    }
    say("DONE\n");
    return 0;
}
