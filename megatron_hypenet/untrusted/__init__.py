"""Read foreign files: bounded in size, depth and number of values, and typed.

Every reader of foreign bytes goes through this package. A file that is too large, is no regular
file, nests too deeply, holds numbers beyond bounds or values of another type ends in one error that
names the file, in time and memory that the limits bound.
"""
