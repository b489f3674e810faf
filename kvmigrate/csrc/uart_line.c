// The life of a UART, its saved state, and its side towards the back-end, see api/uart.h.
#include "uart.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define POWER_ON_DIVISOR 12             // 9600 baud
#define RUSH_BYTES (KMIG_UART_TX_BYTES / 2)   // so much is sent without rest
#define REST_FACTOR 4                   // the sending thread works a fifth of the time
#define MAX_REST_NS 20000000

// The registers. What the guest had sent is on the line: its last words before a reboot come out.
static void power_on(struct kmig_uart *uart)
{
    memset(&uart->s, 0, offsetof(struct kmig_uart_state, tx));
    uart->s.divisor = POWER_ON_DIVISOR;
    uart->s.mcr = KMIG_UART_OUT2;
}

int kmig_uart_create(struct kmig_uart **ret)
{
    struct kmig_uart *uart = calloc(1, sizeof(*uart));
    pthread_condattr_t attr;

    if (!uart)
        return -ENOMEM;
    uart->vm_fd = uart->socket_fd = -1;
    uart->paused = true;
    pthread_mutex_init(&uart->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&uart->changed, &attr);
    pthread_condattr_destroy(&attr);
    power_on(uart);
    *ret = uart;
    return 0;
}

void kmig_uart_destroy(struct kmig_uart *uart)
{
    if (!uart)
        return;
    pthread_cond_destroy(&uart->changed);
    pthread_mutex_destroy(&uart->lock);
    free(uart);
}

void kmig_uart_connect(struct kmig_uart *uart, int vm_fd, uint32_t gsi)
{
    pthread_mutex_lock(&uart->lock);
    uart->vm_fd = vm_fd;
    uart->gsi = gsi;
    pthread_mutex_unlock(&uart->lock);
}

void kmig_uart_send_to(struct kmig_uart *uart, int socket_fd)
{
    pthread_mutex_lock(&uart->lock);
    uart->socket_fd = socket_fd;
    pthread_mutex_unlock(&uart->lock);
}

// Copy nr_bytes of the ring, from its byte `from` on. Under the lock.
static void peek(const struct kmig_uart *uart, uint32_t from, uint8_t *ret, uint32_t nr_bytes)
{
    uint32_t at = (uart->rd + from) % KMIG_UART_TX_BYTES;
    uint32_t first = KMIG_UART_TX_BYTES - at < nr_bytes ? KMIG_UART_TX_BYTES - at : nr_bytes;

    memcpy(ret, uart->s.tx + at, first);
    memcpy(ret + first, uart->s.tx, nr_bytes - first);
}

void kmig_uart_get(struct kmig_uart *uart, struct kmig_uart_state *ret)
{
    pthread_mutex_lock(&uart->lock);
    *ret = uart->s;
    ret->nr_tx = kmig_uart_nr_waiting(uart) - uart->nr_ahead;
    // Who sets this state takes what waits for refused, and so the transmitter for full. Paused, it is so here too.
    ret->thre_pending &= ret->nr_tx == 0;
    peek(uart, uart->nr_ahead, ret->tx, ret->nr_tx);
    pthread_mutex_unlock(&uart->lock);
}

void kmig_uart_set(struct kmig_uart *uart, const struct kmig_uart_state *state)
{
    pthread_mutex_lock(&uart->lock);
    uart->s = *state;
    uart->rd = uart->told = uart->nr_ahead = 0;
    uart->wr = state->nr_tx;
    uart->refused = state->nr_tx > 0;
    pthread_mutex_unlock(&uart->lock);
}

void kmig_uart_reset(struct kmig_uart *uart)
{
    pthread_mutex_lock(&uart->lock);
    power_on(uart);
    kmig_uart_update_irq(uart);
    pthread_mutex_unlock(&uart->lock);
}

static bool has_work(const struct kmig_uart *uart, uint32_t enough)
{
    return uart->quit || (!uart->refused && !uart->paused && kmig_uart_nr_waiting(uart) >= enough);
}

void kmig_uart_send_first(struct kmig_uart *uart)
{
    // A sender that sleeps has left nothing behind: the byte is the only one. Whoever else sends on this socket does so
    // while bytes wait.
    if (uart->socket_fd < 0 || uart->sender != KMIG_SENDER_IDLE || !has_work(uart, 1))
        return;
    const uint8_t *first = uart->s.tx + uart->rd % KMIG_UART_TX_BYTES;
    uart->nr_ahead = send(uart->socket_fd, first, 1, MSG_DONTWAIT | MSG_NOSIGNAL) == 1;
}

void kmig_uart_wake_sender(struct kmig_uart *uart)
{
    if (uart->sender == KMIG_SENDER_BUSY || !has_work(uart, uart->sender == KMIG_SENDER_RESTING ? RUSH_BYTES : 1))
        return;
    uart->sender = KMIG_SENDER_BUSY;
    pthread_cond_signal(&uart->changed);
}

void kmig_uart_pause(struct kmig_uart *uart)
{
    pthread_mutex_lock(&uart->lock);
    uart->paused = true;
    pthread_mutex_unlock(&uart->lock);
}

void kmig_uart_resume(struct kmig_uart *uart)
{
    pthread_mutex_lock(&uart->lock);
    uart->paused = false;
    uart->level = kmig_uart_wants_irq(uart);
    kmig_uart_drive(uart);
    kmig_uart_wake_sender(uart);
    pthread_mutex_unlock(&uart->lock);
}

uint32_t kmig_uart_room(struct kmig_uart *uart)
{
    pthread_mutex_lock(&uart->lock);
    uint32_t room = uart->paused || uart->s.mcr & KMIG_UART_LOOP ? 0 : kmig_uart_rx_room(uart);
    pthread_mutex_unlock(&uart->lock);
    return room;
}

void kmig_uart_receive(struct kmig_uart *uart, const uint8_t *data, uint32_t nr_bytes)
{
    pthread_mutex_lock(&uart->lock);
    uint32_t room = kmig_uart_rx_room(uart);
    uint32_t nr = nr_bytes < room ? nr_bytes : room;
    memcpy(uart->s.rx + uart->s.nr_rx, data, nr);
    uart->s.nr_rx += nr;
    kmig_uart_update_irq(uart);
    pthread_mutex_unlock(&uart->lock);
}

uint32_t kmig_uart_waiting(struct kmig_uart *uart, uint8_t *ret)
{
    pthread_mutex_lock(&uart->lock);
    uint32_t nr = kmig_uart_nr_waiting(uart);
    peek(uart, 0, ret, nr);
    pthread_mutex_unlock(&uart->lock);
    return nr;
}

uint32_t kmig_uart_ahead(struct kmig_uart *uart)
{
    pthread_mutex_lock(&uart->lock);
    uint32_t nr = uart->nr_ahead;
    pthread_mutex_unlock(&uart->lock);
    return nr;
}

void kmig_uart_sent(struct kmig_uart *uart, uint32_t nr_bytes, int refused)
{
    pthread_mutex_lock(&uart->lock);
    bool was_ready = kmig_uart_tx_ready(uart);
    uint32_t nr = kmig_uart_nr_waiting(uart);
    uart->rd += nr_bytes < nr ? nr_bytes : nr;
    uart->nr_ahead -= nr_bytes < uart->nr_ahead ? nr_bytes : uart->nr_ahead;
    uart->refused = refused && kmig_uart_nr_waiting(uart);
    kmig_uart_tx_changed(uart, was_ready);
    kmig_uart_update_irq(uart);
    kmig_uart_wake_sender(uart);
    pthread_mutex_unlock(&uart->lock);
}

// One value that another thread may be changing.
static int ask(struct kmig_uart *uart, const bool *value)
{
    pthread_mutex_lock(&uart->lock);
    int found = *value;
    pthread_mutex_unlock(&uart->lock);
    return found;
}

int kmig_uart_level(struct kmig_uart *uart)
{
    return ask(uart, &uart->level);
}

int kmig_uart_paused(struct kmig_uart *uart)
{
    return ask(uart, &uart->paused);
}

int kmig_uart_refused(struct kmig_uart *uart)
{
    return ask(uart, &uart->refused);
}

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

// Under the lock: stand still in proportion to the processor time that the sending of the last bytes took.
static void rest(struct kmig_uart *uart)
{
    uint64_t worked = clock_ns(CLOCK_THREAD_CPUTIME_ID) - uart->worked_from_ns;
    uint64_t pause = worked * REST_FACTOR < MAX_REST_NS ? worked * REST_FACTOR : MAX_REST_NS;
    uint64_t until = clock_ns(CLOCK_MONOTONIC) + pause;
    struct timespec at = {until / 1000000000, until % 1000000000};
    int rc = 0;

    while (rc == 0 && !has_work(uart, RUSH_BYTES)) {
        uart->sender = KMIG_SENDER_RESTING;
        rc = pthread_cond_timedwait(&uart->changed, &uart->lock, &at);
    }
}

int kmig_uart_wait(struct kmig_uart *uart)
{
    pthread_mutex_lock(&uart->lock);
    if (uart->worked_from_ns)
        rest(uart);
    while (!has_work(uart, 1)) {
        uart->sender = KMIG_SENDER_IDLE;
        pthread_cond_wait(&uart->changed, &uart->lock);
    }
    uart->sender = KMIG_SENDER_BUSY;
    uart->worked_from_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    bool goes_on = !uart->quit;
    pthread_mutex_unlock(&uart->lock);
    return goes_on;
}

void kmig_uart_quit(struct kmig_uart *uart)
{
    pthread_mutex_lock(&uart->lock);
    uart->quit = true;
    kmig_uart_wake_sender(uart);
    pthread_mutex_unlock(&uart->lock);
}
