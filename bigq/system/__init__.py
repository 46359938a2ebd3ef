"""What the machine and its operating system give: cores, memory, files; and text for people."""
