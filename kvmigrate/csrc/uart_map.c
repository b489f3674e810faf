// The state of a UART as a msgpack map and back, see api/uart.h. The wire has these names and this order since the first
// version, when Python wrote it.
#include "uart.h"

#include <stddef.h>

#define FIELD(member, how, more)                                                                          \
    {                                                                                                     \
        .name = #member, .name_bytes = sizeof(#member) - 1, .kind = how, .count = 1, .length_at = more,   \
        .offset = offsetof(struct kmig_uart_state, member),                                               \
        .size_bytes = sizeof(((struct kmig_uart_state *)0)->member),                                      \
    }
#define NUMBER(member) FIELD(member, KMIG_FIELD_UNSIGNED, 0)
#define TRUTH(member) FIELD(member, KMIG_FIELD_TRUTH, 0)
#define ROW(member) FIELD(member, KMIG_FIELD_ROW, offsetof(struct kmig_uart_state, nr_##member))

static const struct kmig_field field[] = {
    NUMBER(divisor), NUMBER(ier), NUMBER(fcr), NUMBER(lcr), NUMBER(mcr), NUMBER(msr_delta), NUMBER(scr),
    TRUTH(overrun), TRUTH(thre_pending), ROW(rx), ROW(tx),
};
static const struct kmig_layout layout = {field, sizeof(field) / sizeof(field[0]), sizeof(struct kmig_uart_state)};

long kmig_uart_pack(struct kmig_uart *uart, void *out, uint64_t room_bytes)
{
    struct kmig_uart_state state;

    kmig_uart_get(uart, &state);
    return kmig_layout_encode(&layout, &state, out, room_bytes);
}

// The rules beyond type and length; a UART could never come to be in a state that breaks one.
static bool is_possible(const struct kmig_uart_state *s)
{
    uint32_t rx_bytes = s->fcr & KMIG_UART_FIFO_ON ? KMIG_UART_FIFO_BYTES : 1;

    if (s->ier & ~KMIG_UART_IER_BITS || s->mcr & ~KMIG_UART_MCR_BITS || s->msr_delta & ~KMIG_UART_MSR_DELTA_BITS)
        return false;
    if (s->fcr & ~KMIG_UART_FCR_BITS || (s->fcr && !(s->fcr & KMIG_UART_FIFO_ON)))
        return false;
    return s->nr_rx <= rx_bytes && !(s->thre_pending && s->nr_tx);
}

int kmig_uart_load(struct kmig_uart *uart, const void *in, uint64_t size_bytes)
{
    struct kmig_uart_state state = {0};
    struct kmig_map_error error;

    if (kmig_layout_decode(&layout, in, size_bytes, &state, &error) || !is_possible(&state))
        return -EINVAL;
    kmig_uart_set(uart, &state);
    return 0;
}
