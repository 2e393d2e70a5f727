"""Pages: one HTML file each, with its data, style and script inside."""
