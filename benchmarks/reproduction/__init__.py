"""The parts of a reproduction: the setting, what is kept between calls, the core, and the further tables."""
