"""The experiments, a file each: a module with a `Study` named STUDY is all that it takes."""
