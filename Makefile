# What a stranger types. Every target makes itself ready first; see scripts/ for what each step does.
.PHONY: run test bench lint

run:
	@scripts/setup run
	cargo build --locked --release --workspace --bins
	@exec scripts/run

test:
	@scripts/setup test
	@exec scripts/test

bench:
	@scripts/setup bench
	cargo build --locked --release --workspace --bins
	@exec scripts/bench

lint:
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
