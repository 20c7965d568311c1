"""DeepSpeed as a second engine for data parallelism and ZeRO; its JSON files as configuration."""
