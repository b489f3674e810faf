// What every file of the C core includes. The files under api/ are plain declarations without preprocessor
// conditionals: this header includes them, and cffi reads the same files as its cdef, so there is one declaration of each.
//
// Every function returns 0 or a count, or -errno; none prints, exits or knows of Python.
#ifndef KMIG_CORE_H
#define KMIG_CORE_H

#include <errno.h>
#include <linux/kvm.h>
#include <linux/kvm_para.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "api/ioctl.h"
#include "api/layout.h"
#include "api/vcpu.h"
#include "api/thread.h"
#include "api/uart.h"
#include "api/memory.h"
#include "api/dirty.h"
#include "api/delta.h"
#include "api/zerocopy.h"
#include "api/splice.h"
#include "api/page.h"
#include "api/plain.h"
#include "api/frames.h"
#include "api/stream.h"
#include "api/file.h"
#include "api/virtio.h"
#include "api/virtio_balloon.h"
#include "api/virtio_console.h"
#include "api/virtio_net.h"

// A planted fault exists only in the test build that is compiled with -DKMIG_PLANTED_FAULTS; elsewhere this is 0
// and the compiler removes what it guards. tests/planted names each one and says which oracle catches it.
#ifdef KMIG_PLANTED_FAULTS
bool kmig_fault_is(const char *name);
#define KMIG_FAULT(name) kmig_fault_is(name)
#else
#define KMIG_FAULT(name) 0
#endif

#endif
