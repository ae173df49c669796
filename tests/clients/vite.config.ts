// Bundles each program for Node, as Vite bundles a frontend.
import { readdirSync } from "node:fs";
import { defineConfig } from "vite";

export default defineConfig({
  build: {
    ssr: true,
    target: "node20",
    rollupOptions: {
      input: readdirSync("src/programs").map((name) => `src/programs/${name}`),
    },
  },
  ssr: { noExternal: true },
});
