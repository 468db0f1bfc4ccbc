"""What is wrong with a RoPE configuration: the traps that engines and libraries fell into, each with its mend."""
