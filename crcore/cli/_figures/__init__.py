"""The figures of the command, for .png files and for the page of `crcore report` alike."""
