"""The parts of a reproduction: the setting, what is kept between calls, and the core."""
