"""The figures, each in a light and a dark dress; they draw numbers and work nothing out."""
