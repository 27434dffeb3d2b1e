"""What the engine will do and why: a pure function of the configuration, the architecture and the hardware."""
