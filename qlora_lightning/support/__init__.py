"""What all other folders use: console, errors, files, imports, the Trainer, versions."""
