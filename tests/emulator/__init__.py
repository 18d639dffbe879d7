"""A PTX emulator, and what runs this project's kernels in it: see README.md."""
