"""One module a backend; dispatch.py says what it must hold."""
