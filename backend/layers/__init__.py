"""Building blocks of a decoder: tensor parallel, ignorant of families and of the engine."""
