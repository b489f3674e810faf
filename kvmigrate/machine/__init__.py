"""A whole guest: kernel objects, memory, devices and boot put together, as migration and snapshot see it."""
