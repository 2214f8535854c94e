"""The same functions, once per backend; each backend is ignorant of the others."""
