# The second environment of the tests: transformers 4, which must read what export writes. torch, numpy and safetensors
# are the first one's.

.venv-transformers4: tests/transformers4-constraints.txt | $(VENV)/installed
	rm -rf $@.partial $@
	$(PYTHON) -m venv $@.partial
	$@.partial/bin/python -m pip install --quiet --no-deps --requirement tests/transformers4-constraints.txt
	$(VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])' \
		> "$$($@.partial/bin/python -c 'import site; print(site.getsitepackages()[0])')/first-environment.pth"
	mv $@.partial $@
	touch $@
