"""What knows of the files of Wan 2.1: weights, text encoder, VAE, videos."""
