"""The training job: real models on real files, from one YAML file (`shardembed train`)."""
