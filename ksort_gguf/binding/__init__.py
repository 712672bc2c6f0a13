"""The C libraries: ffi.py alone knows cffi, and raw addresses stay in this room."""
