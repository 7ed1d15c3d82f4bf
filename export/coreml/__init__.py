"""The Core ML container: a package that iPhones and Macs run, written without coremltools."""
