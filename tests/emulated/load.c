// Work that checks itself, for a guest to do while it moves: memory that must hold what was written, a file read back past
// every cache, and a stream whose every word is known. Each counts its rounds in a file; what is wrong ends it, and that
// file then says "bad". Static: the guest has no libraries.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BLOCK_BYTES = 16 << 10, BLOCK_WORDS = BLOCK_BYTES / 8, REST_US = 10000 };

static int status_fd;

static void say(const char *format, ...)
{
    char text[128];
    va_list arguments;

    va_start(arguments, format);
    int length = vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    if (pwrite(status_fd, text, (size_t)length, 0) != length)
        abort();
}

static void bad(const char *what, uint64_t at)
{
    say("bad %s at %lu: %s\n", what, (unsigned long)at, strerror(errno));
    exit(1);
}

static uint64_t word_of(uint64_t round, uint64_t at)
{
    uint64_t x = (round + 1) * 0x9E3779B97F4A7C15u ^ at * 0xD1B54A32D192ED03u;
    return x ^ x >> 29;
}

static void fill(uint64_t *words, uint64_t round, uint64_t first)
{
    for (uint64_t i = 0; i < BLOCK_WORDS; i++)
        words[i] = word_of(round, first + i);
}

static void verify(const char *what, const uint64_t *words, uint64_t round, uint64_t first)
{
    errno = 0;
    for (uint64_t i = 0; i < BLOCK_WORDS; i++)
        if (words[i] != word_of(round, first + i))
            bad(what, first + i);
}

static uint64_t *allocate(uint64_t size_bytes)
{
    void *at = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        bad("memory", size_bytes);
    return at;
}

// Each block is found as the round before left it, and written for this one.
static void memory(uint64_t size_bytes)
{
    uint64_t nr_blocks = size_bytes / BLOCK_BYTES;
    uint64_t *words = allocate(size_bytes);

    for (uint64_t round = 0;; round++) {
        for (uint64_t block = 0; block < nr_blocks; block++) {
            uint64_t *at = words + block * BLOCK_WORDS;
            if (round)
                verify("memory", at, round - 1, block * BLOCK_WORDS);
            fill(at, round, block * BLOCK_WORDS);
            usleep(REST_US);
        }
        say("%lu rounds\n", (unsigned long)round + 1);
    }
}

// O_DIRECT: what is read back comes from the disk, not from the guest's own cache.
static void file(const char *path, uint64_t size_bytes)
{
    uint64_t nr_blocks = size_bytes / BLOCK_BYTES;
    uint64_t *words = allocate(BLOCK_BYTES);
    int fd = open(path, O_RDWR | O_DIRECT);

    if (fd < 0)
        bad("open", 0);
    for (uint64_t round = 0;; round++) {
        for (uint64_t block = 0; block < nr_blocks; block++) {
            off_t at = (off_t)(block * BLOCK_BYTES);
            errno = 0;
            if (round && pread(fd, words, BLOCK_BYTES, at) != BLOCK_BYTES)
                bad("read", block);
            if (round)
                verify("file", words, round - 1, block * BLOCK_WORDS);
            fill(words, round, block * BLOCK_WORDS);
            if (pwrite(fd, words, BLOCK_BYTES, at) != BLOCK_BYTES)
                bad("write", block);
            usleep(REST_US);
        }
        if (fsync(fd) < 0)
            bad("sync", round);
        say("%lu rounds\n", (unsigned long)round + 1);
    }
}

static int dial(const char *address, uint16_t port)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);

    if (fd < 0 || inet_pton(AF_INET, address, &to.sin_addr) != 1 || connect(fd, (void *)&to, sizeof(to)) < 0)
        bad("connect", port);
    return fd;
}

static void receive_whole(int fd, uint8_t *into, uint64_t block)
{
    for (size_t got = 0; got < BLOCK_BYTES;) {
        errno = 0;
        ssize_t n = recv(fd, into + got, BLOCK_BYTES - got, 0);
        if (n <= 0)
            bad("connection", block);
        got += (size_t)n;
    }
}

static void download(const char *address, uint16_t port)
{
    uint64_t *words = allocate(BLOCK_BYTES);
    int fd = dial(address, port);

    for (uint64_t block = 0;; block++) {
        receive_whole(fd, (uint8_t *)words, block);
        verify("stream", words, 0, block * BLOCK_WORDS);
        say("%lu rounds\n", (unsigned long)block + 1);
    }
}

// The other end of a download, for one client.
static void serve(uint16_t port)
{
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(port)};
    uint64_t *words = allocate(BLOCK_BYTES);
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;

    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    if (fd < 0 || bind(fd, (void *)&here, sizeof(here)) < 0 || listen(fd, 1) < 0)
        bad("listen", port);
    int client = accept(fd, NULL, NULL);
    for (uint64_t block = 0;; block++) {
        fill(words, 0, block * BLOCK_WORDS);
        errno = 0;
        if (send(client, words, BLOCK_BYTES, MSG_NOSIGNAL) != BLOCK_BYTES)
            bad("send", block);
        say("%lu rounds\n", (unsigned long)block + 1);
        usleep(10 * REST_US);
    }
}

int main(int argc, char **argv)
{
    if (argc < 4 || (status_fd = open(argv[1], O_WRONLY | O_CREAT | O_TRUNC, 0644)) < 0) {
        fputs("use: load STATUS memory MIB | file MIB PATH | download PORT ADDRESS | serve PORT\n", stderr);
        return 2;
    }
    uint64_t number = strtoull(argv[3], NULL, 0);
    say("0 rounds\n");
    if (!strcmp(argv[2], "memory"))
        memory(number << 20);
    else if (!strcmp(argv[2], "file") && argc > 4)
        file(argv[4], number << 20);
    else if (!strcmp(argv[2], "download") && argc > 4)
        download(argv[4], (uint16_t)number);
    else if (!strcmp(argv[2], "serve"))
        serve((uint16_t)number);
    return 2;
}
