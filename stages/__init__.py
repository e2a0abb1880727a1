"""One recipe a stage: read the section, open the inputs, call the pipeline, publish the outputs."""
