// A 16550A UART (National Semiconductor PC16550D data sheet), see api/uart.h and devices/serial.py.
#include "uart.h"

#include <string.h>

enum { DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR };

#define IER_RX 1
#define IER_THRE 2
#define IER_LINE 4
#define IER_MODEM 8
#define IIR_MODEM 0
#define IIR_NONE 1
#define IIR_THRE 2
#define IIR_RX 4
#define IIR_LINE 6
#define IIR_TIMEOUT 0x0C
#define IIR_FIFO_ON 0xC0
#define FCR_ENABLE KMIG_UART_FIFO_ON
#define FCR_CLEAR_RX 2
#define FCR_CLEAR_TX 4
#define LCR_DLAB 0x80
#define MCR_LOOP KMIG_UART_LOOP
#define LSR_DR 1
#define LSR_OVERRUN 2
#define LSR_EMPTY 0x60          // THRE and TEMT
#define MSR_CONNECTED 0xB0      // CTS, DSR and DCD
#define MSR_RI 0x40

static bool divisor_shown(const struct kmig_uart *uart)
{
    return uart->s.lcr & LCR_DLAB;
}

static uint8_t modem_lines(const struct kmig_uart *uart)
{
    uint8_t mcr = uart->s.mcr;

    if (!(mcr & MCR_LOOP))
        return MSR_CONNECTED;
    // DTR to DSR, RTS to CTS, OUT1 to RI, OUT2 to DCD.
    return (mcr & 1) << 5 | (mcr & 2) << 3 | (mcr & 0x0C) << 4;
}

// The pending interrupt of the highest priority, as IIR gives it.
static uint8_t cause(const struct kmig_uart *uart)
{
    static const uint8_t trigger_bytes[] = {1, 4, 8, 14};
    const struct kmig_uart_state *s = &uart->s;

    if (s->ier & IER_LINE && s->overrun)
        return IIR_LINE;
    if (s->ier & IER_RX && s->nr_rx)
        return !(s->fcr & FCR_ENABLE) || s->nr_rx >= trigger_bytes[s->fcr >> 6] ? IIR_RX : IIR_TIMEOUT;
    if (s->ier & IER_THRE && s->thre_pending)
        return IIR_THRE;
    return s->ier & IER_MODEM && s->msr_delta ? IIR_MODEM : IIR_NONE;
}

bool kmig_uart_wants_irq(const struct kmig_uart *uart)
{
    return cause(uart) != IIR_NONE;
}

void kmig_uart_drive(const struct kmig_uart *uart)
{
    struct kvm_irq_level line = {.irq = uart->gsi, .level = uart->level};

    if (uart->vm_fd >= 0)
        kmig_ioctl(uart->vm_fd, KVM_IRQ_LINE, &line);
}

void kmig_uart_update_irq(struct kmig_uart *uart)
{
    bool level = kmig_uart_wants_irq(uart);

    if (level == uart->level)
        return;
    uart->level = level;
    kmig_uart_drive(uart);
}

void kmig_uart_tx_changed(struct kmig_uart *uart, bool was_ready)
{
    bool ready = kmig_uart_tx_ready(uart);

    if (ready)
        uart->told = uart->wr;
    if (ready != was_ready)
        uart->s.thre_pending = ready;
}

static void transmit(struct kmig_uart *uart, uint8_t value)
{
    bool was_ready = kmig_uart_tx_ready(uart);

    if (kmig_uart_nr_waiting(uart) == KMIG_UART_TX_BYTES)
        return;
    uart->s.tx[uart->wr++ % KMIG_UART_TX_BYTES] = value;
    uart->refused |= uart->paused;
    kmig_uart_tx_changed(uart, was_ready);
    kmig_uart_send_first(uart);
    kmig_uart_wake_sender(uart);
}

static void write_data(struct kmig_uart *uart, uint8_t value)
{
    struct kmig_uart_state *s = &uart->s;

    if (!(s->mcr & MCR_LOOP))
        transmit(uart, value);
    else if (kmig_uart_rx_room(uart))
        s->rx[s->nr_rx++] = value;
    else
        s->overrun = true;
    s->thre_pending = kmig_uart_tx_ready(uart);
}

static void write_ier(struct kmig_uart *uart, uint8_t value)
{
    bool turned_on = value & ~uart->s.ier & IER_THRE;

    uart->s.ier = value & KMIG_UART_IER_BITS;
    if (turned_on && kmig_uart_tx_ready(uart))
        uart->s.thre_pending = true;
}

static void write_fcr(struct kmig_uart *uart, uint8_t value)
{
    struct kmig_uart_state *s = &uart->s;
    bool toggled = (value ^ s->fcr) & FCR_ENABLE;

    if (toggled || value & FCR_CLEAR_RX)
        s->nr_rx = 0;
    if ((toggled || value & FCR_CLEAR_TX) && !kmig_uart_tx_ready(uart)) {
        // What the guest was told to have left must leave.
        uart->wr = (int32_t)(uart->told - uart->rd) > 0 ? uart->told : uart->rd;
        uart->refused = uart->refused && kmig_uart_nr_waiting(uart);
        kmig_uart_tx_changed(uart, false);
    }
    s->fcr = value & FCR_ENABLE ? value & KMIG_UART_FCR_BITS : 0;
}

static void write_mcr(struct kmig_uart *uart, uint8_t value)
{
    uint8_t before = modem_lines(uart);

    uart->s.mcr = value & KMIG_UART_MCR_BITS;
    uint8_t after = modem_lines(uart);
    // The ring indicator tells only its trailing edge.
    uart->s.msr_delta |= ((before ^ after) >> 4 & 0x0B) | (before & ~after & MSR_RI) >> 4;
}

static void write_register(struct kmig_uart *uart, uint32_t offset, uint8_t value)
{
    struct kmig_uart_state *s = &uart->s;

    if (offset == DATA && divisor_shown(uart))
        s->divisor = (s->divisor & 0xFF00) | value;
    else if (offset == DATA)
        write_data(uart, value);
    else if (offset == IER && divisor_shown(uart))
        s->divisor = (s->divisor & 0xFF) | value << 8;
    else if (offset == IER)
        write_ier(uart, value);
    else if (offset == IIR_FCR)
        write_fcr(uart, value);
    else if (offset == LCR)
        s->lcr = value;
    else if (offset == MCR)
        write_mcr(uart, value);
    else if (offset == SCR)
        s->scr = value;
    kmig_uart_update_irq(uart);
}

static uint8_t read_data(struct kmig_uart *uart)
{
    struct kmig_uart_state *s = &uart->s;

    if (!s->nr_rx)
        return 0;
    uint8_t value = s->rx[0];
    memmove(s->rx, s->rx + 1, --s->nr_rx);
    return value;
}

static uint8_t read_iir(struct kmig_uart *uart)
{
    uint8_t found = cause(uart);

    if (found == IIR_THRE)
        uart->s.thre_pending = false;
    return found | (uart->s.fcr & FCR_ENABLE ? IIR_FIFO_ON : 0);
}

static uint8_t read_lsr(struct kmig_uart *uart)
{
    uint8_t value = (uart->s.nr_rx ? LSR_DR : 0) | (uart->s.overrun ? LSR_OVERRUN : 0);

    uart->s.overrun = false;
    return value | (kmig_uart_tx_ready(uart) ? LSR_EMPTY : 0);
}

static uint8_t read_msr(struct kmig_uart *uart)
{
    uint8_t value = modem_lines(uart) | uart->s.msr_delta;

    uart->s.msr_delta = 0;
    return value;
}

static uint8_t read_register(struct kmig_uart *uart, uint32_t offset)
{
    const struct kmig_uart_state *s = &uart->s;
    uint8_t value;

    switch (offset) {
    case DATA:
        value = divisor_shown(uart) ? s->divisor & 0xFF : read_data(uart);
        break;
    case IER:
        value = divisor_shown(uart) ? s->divisor >> 8 : s->ier;
        break;
    case IIR_FCR:
        value = read_iir(uart);
        break;
    case LSR:
        value = read_lsr(uart);
        break;
    case MSR:
        value = read_msr(uart);
        break;
    default:
        value = offset == LCR ? s->lcr : offset == MCR ? s->mcr : offset == SCR ? s->scr : 0xFF;
    }
    kmig_uart_update_irq(uart);
    return value;
}

// Whether the caller of kmig_uart_answer has more to do than the access.
static bool concerns_others(const struct kmig_uart *uart, uint32_t offset, bool is_write, uint32_t count)
{
    if (offset == IIR_FCR || offset == MCR)
        return is_write;
    if (offset != DATA || divisor_shown(uart))
        return false;
    if (!is_write)
        return kmig_uart_rx_room(uart) == 0;
    return !(uart->s.mcr & MCR_LOOP) && KMIG_UART_TX_BYTES - kmig_uart_nr_waiting(uart) < count;
}

bool kmig_uart_answer(struct kmig_uart *uart, uint32_t offset, bool is_write, uint8_t *data, uint32_t count)
{
    pthread_mutex_lock(&uart->lock);
    bool mine = !concerns_others(uart, offset, is_write, count);
    for (uint32_t i = 0; mine && i < count; i++) {
        if (is_write)
            write_register(uart, offset, data[i]);
        else
            data[i] = read_register(uart, offset);
    }
    pthread_mutex_unlock(&uart->lock);
    return mine;
}

uint8_t kmig_uart_read(struct kmig_uart *uart, uint32_t offset)
{
    pthread_mutex_lock(&uart->lock);
    uint8_t value = read_register(uart, offset);
    pthread_mutex_unlock(&uart->lock);
    return value;
}

void kmig_uart_write(struct kmig_uart *uart, uint32_t offset, uint8_t value)
{
    pthread_mutex_lock(&uart->lock);
    write_register(uart, offset, value);
    pthread_mutex_unlock(&uart->lock);
}

int kmig_uart_is_full(struct kmig_uart *uart)
{
    pthread_mutex_lock(&uart->lock);
    bool on_line = !divisor_shown(uart) && !(uart->s.mcr & MCR_LOOP);
    bool full = on_line && kmig_uart_nr_waiting(uart) == KMIG_UART_TX_BYTES;
    pthread_mutex_unlock(&uart->lock);
    return full;
}
