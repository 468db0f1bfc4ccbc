"""The parts of the fault campaign: commands in forked processes, faults put into them, and what they leave behind."""
