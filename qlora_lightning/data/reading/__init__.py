"""Files and data sets of the hub as rows, each with the line it stands on, from any position."""
