# dcp_native: `make demo` runs the main job, `make test` runs all tests.  See README.md.
#
# Every command works from a fresh clone: it makes .venv, installs torch and builds the package first.
# With a torch already installed: make demo PYTHON=/path/to/python (its environment is used as it is).

VENV    := .venv
TORCH   := torch==2.13.0
BASE    ?= python3
CC      ?= gcc

ifdef PYTHON
RUN_PY  := $(PYTHON)
else
RUN_PY  := $(VENV)/bin/python
endif

CORE_SRC   := $(wildcard csrc/core/*.c)
CUDA_SRC   := $(wildcard csrc/cuda/cuda_*.c csrc/cuda/kernel_*.c csrc/cuda/nccl_*.c)
CTEST_SRC  := $(wildcard tests/c/test_*.c)
CTEST_AID  := $(filter-out $(CTEST_SRC),$(wildcard tests/c/*.c))
HEADERS    := $(wildcard csrc/include/*.h csrc/core/*.h csrc/cuda/*.h tests/c/*.h benchmarks/*.h)
CTESTS     := $(patsubst tests/c/%.c,build/ctest/%,$(CTEST_SRC))
T          ?= *

C_WARN  := -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla -Wconversion -Wno-sign-conversion
C_FLAGS := -std=c11 -D_GNU_SOURCE -O1 -g -fno-omit-frame-pointer -DDCP_DEBUG -Icsrc/include -Icsrc/core -Icsrc/cuda -Itests/c $(C_WARN)
SANITIZE ?= -fsanitize=address,undefined -fno-sanitize-recover=undefined

.PHONY: demo test test-clients test-cuda build-cuda bench lint ctest ctest-build clean set-up build compile_commands FORCE

# T=name runs one.
CTEST_WANTED := $(if $(filter *,$(T)),$(CTESTS),$(addprefix build/ctest/test_,$(T)))

ctest-build: $(CTEST_WANTED)

# Two at a time, the longest first; what each prints comes when it is done.
CTEST_LONGEST := $(addprefix build/ctest/test_,commit_model crash incremental_faults)
CTEST_ORDER    = $(filter $(CTEST_LONGEST),$(CTEST_WANTED)) $(filter-out $(CTEST_LONGEST),$(CTEST_WANTED))

ctest: $(CTEST_WANTED)
	@printf '%s\n' $(CTEST_ORDER) | xargs -P 2 -I{} sh -c \
	    'timeout 600 {} > {}.log 2>&1; rc=$$?; echo "== {}"; cat {}.log; exit $$rc'

# Objects are kept: a chain of implicit rules would delete them.
.SECONDARY:

build/obj/%.o: csrc/core/%.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) $(SANITIZE) -Werror -c $< -o $@

build/obj/aid_%.o: tests/c/%.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) $(SANITIZE) -c $< -o $@

build/libcore.a: $(patsubst csrc/core/%.c,build/obj/%.o,$(CORE_SRC))
	@rm -f $@
	ar rcs $@ $^

# Without kernels: what runs them in tests needs no image of them.
build/obj/cuda/%.o: csrc/cuda/%.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) $(SANITIZE) -Werror -c $< -o $@

build/libcuda_tables.a: $(patsubst csrc/cuda/%.c,build/obj/cuda/%.o,$(CUDA_SRC))
	@rm -f $@
	ar rcs $@ $^

build/ctest/%: tests/c/%.c $(patsubst tests/c/%.c,build/obj/aid_%.o,$(CTEST_AID)) build/libcuda_tables.a build/libcore.a $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) $(SANITIZE) $< $(filter %.o,$^) build/libcuda_tables.a build/libcore.a -ldl -lpthread -o $@

# The writer process, as its tests start it.
build/ctest/dcp_writer: csrc/writer/main.c build/libcore.a $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) $(SANITIZE) -Werror $< build/libcore.a -lpthread -o $@

build/ctest/test_writer_mappings build/ctest/test_writer_message build/ctest/test_writer_process build/ctest/test_writer_survive: build/ctest/dcp_writer

# CUDA and NCCL as their tests have them.
build/fake/.built: $(wildcard tests/fake/*)
	sh tests/fake/build.sh $(CURDIR)/build/fake
	@touch $@

build/ctest/test_nccl_comm: build/fake/.built

# ---- benchmarks in C: the core as the package has it, without sanitizers ----

BENCH_FLAGS := -std=c11 -D_GNU_SOURCE -O3 -g -Icsrc/include -Icsrc/core $(C_WARN)

build/bench/obj/%.o: csrc/core/%.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(BENCH_FLAGS) -c $< -o $@

build/bench/libcore.a: $(patsubst csrc/core/%.c,build/bench/obj/%.o,$(CORE_SRC))
	@rm -f $@
	ar rcs $@ $^

build/bench/%: benchmarks/%.c build/bench/libcore.a $(HEADERS)
	$(CC) $(BENCH_FLAGS) $< build/bench/libcore.a -lpthread -o $@

# The table over NCCL needs little of the core, and the fake libraries to run.
build/bench/nccl_comm: benchmarks/nccl_comm.c $(wildcard csrc/cuda/nccl_*.c) build/fake/.built $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(BENCH_FLAGS) -Icsrc/cuda $< csrc/cuda/cuda_api.c csrc/cuda/cuda_context.c \
	    $(wildcard csrc/cuda/nccl_*.c) csrc/core/error.c csrc/core/alloc.c -ldl -lpthread -o $@

# ---- the package: environment, build, lint ----

# What decides the package's binaries besides its sources: interpreter, torch, switches.
BUILD_ID  = $(RUN_PY) -c 'import sys, importlib.metadata as m; \
    print(sys.executable, sys.version, *(d.version for d in m.distributions(name="torch")))'
EXT_SRC  := $(wildcard csrc/core/*.[ch] csrc/cuda/*.[ch] csrc/cuda/*.cu csrc/py/*.[ch] csrc/include/*.h csrc/writer/*.c csrc/bridge/*.cpp csrc/bridge/*.h)
SETUP_SRC := setup.py pyproject.toml

ifdef PYTHON
SET_UP   :=
INSTALL   = $(RUN_PY) setup.py --quiet build_ext --inplace --force
else
SET_UP   := $(VENV)/.set-up
INSTALL   = $(RUN_PY) -m pip install --quiet --no-build-isolation --no-deps -e .
endif

set-up: $(SET_UP)

$(VENV)/.set-up: requirements-test.txt
	@test -x $(VENV)/bin/python || { echo "== making $(VENV)"; $(BASE) -m venv $(VENV); }
	@echo "== installing $(TORCH) and the test tools into $(VENV) (a few minutes the first time)"
	$(VENV)/bin/python -m pip install --quiet $(TORCH) 'setuptools>=77' wheel -r requirements-test.txt
	@touch $@

# Rewritten only when it changes, so that a build for another interpreter is a build anew.
build/.id: FORCE $(SET_UP)
	@mkdir -p build
	@id="$$($(BUILD_ID)) $$DCP_NATIVE_SANITIZE/$$DCP_NATIVE_DEBUG/$$DCP_NATIVE_COVERAGE"; \
	    [ "$$id" = "$$(cat $@ 2>/dev/null)" ] || echo "$$id" > $@

# A change of sources compiles the module it belongs to; anything else installs the package anew.
build/.built: build/.id $(SETUP_SRC) $(EXT_SRC)
	@echo "== building dcp_native for $(RUN_PY)"
	$(if $(filter build/.id $(SETUP_SRC),$?),$(INSTALL),$(RUN_PY) setup.py --quiet build_ext --inplace)
	@touch $@

build: build/.built

lint: $(SET_UP)
	$(RUN_PY) -m ruff check .

# ---- what people run ----

demo: build
	$(RUN_PY) demo/run.py

# C tests under sanitizers, then the rest with the built package.
test: build
	$(MAKE) --no-print-directory -j2 ctest-build
	$(MAKE) --no-print-directory ctest
	$(MAKE) --no-print-directory lint
	$(RUN_PY) -m pytest -q
	$(MAKE) --no-print-directory test-cuda

# Real clients from the registry over the package as a user installs it; not part of `make test`.
CLIENTS := build/clients

$(CLIENTS)/.set-up: tests/clients/requirements.txt
	@test -x $(CLIENTS)/bin/python || $(BASE) -m venv $(CLIENTS)
	@echo "== installing $(TORCH) and the clients into $(CLIENTS) (a few minutes the first time)"
	$(CLIENTS)/bin/python -m pip install --quiet $(TORCH) 'setuptools>=77' wheel -r $<
	@touch $@

test-clients: $(CLIENTS)/.set-up
	$(CLIENTS)/bin/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	$(CLIENTS)/bin/python -m pytest -q tests/clients $(if $(filter *,$(T)),,-k '$(T)')

# torch's build for CUDA with devices and NCCL that are fakes: no GPU is needed.  It has an environment
# and a copy of the tree of its own.  With such a torch already installed:
#     make test-cuda PYTHON_CUDA=/path/to/python
CUDA_TORCH := torch==2.14.1
CUDA_VENV  := .venv-cuda
CUDA_TREE  := build/cuda-tree

ifdef PYTHON_CUDA
RUN_CUDA    := $(PYTHON_CUDA)
CUDA_SET_UP :=
else
RUN_CUDA    := $(CURDIR)/$(CUDA_VENV)/bin/python
CUDA_SET_UP := $(CUDA_VENV)/.set-up
endif

$(CUDA_VENV)/.set-up: requirements-test.txt
	@test -x $(CUDA_VENV)/bin/python || { echo "== making $(CUDA_VENV)"; $(BASE) -m venv $(CUDA_VENV); }
	@echo "== installing $(CUDA_TORCH) with CUDA's libraries into $(CUDA_VENV) (3 GB the first time)"
	$(CUDA_VENV)/bin/python -m pip install --quiet $(CUDA_TORCH) 'setuptools>=77' wheel -r $<
	@touch $@

build-cuda: $(CUDA_SET_UP)
	@echo "== building dcp_native for $(RUN_CUDA) in $(CUDA_TREE)"
	@$(RUN_CUDA) tools/copy_tree.py $(CUDA_TREE)
	@cd $(CUDA_TREE) && mkdir -p build && $(RUN_CUDA) -c 'import sys; print(sys.executable)' > build/.new && \
	    { cmp -s build/.new build/.id || rm -rf build/temp* build/lib* dcp_native/*.so; } && \
	    $(RUN_CUDA) setup.py --quiet build_ext --inplace && mv build/.new build/.id

test-cuda: build-cuda
	cd $(CUDA_TREE) && $(RUN_CUDA) -m pytest -q tests/cuda $(if $(filter *,$(T)),,-k '$(T)')

bench: build
	$(RUN_PY) benchmarks/bench.py $(BENCH)

compile_commands: $(SET_UP)
	$(RUN_PY) tools/compile_commands.py

FORCE:

clean:
	rm -rf build dcp_native/*.so dcp_native/_writer *.egg-info compile_commands.json
